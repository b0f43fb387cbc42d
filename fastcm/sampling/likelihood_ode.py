"""The probability flow ODE with the change of log density along it (arXiv 2011.13456, section 4.3 and appendix D.2).

For a denoiser D(x; sigma) the ODE is dx / dsigma = (x - D) / sigma (arXiv 2206.00364, Eq. 1 and 3), and log p_sigma(x)
falls along it by the divergence of the right side. Everything is in nats and fp64; the network sees fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import CheckpointError, ConfigError
from fastcm.sampling.common import Denoiser, denoise

# The rho of the grid that CTM's official code measures time on (arXiv 2206.00364, Eq. 5).
OFFICIAL_RHO = 7
MAX_SOLVER_STEPS = 20_000

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Path:
    """Where the ODE takes images.

    end_NCHW: the state at the largest noise level. gain_KN: log p(start) - log p_sigma_max(end) of each image, in nats, one
    row per probe, or one row for the exact trace. num_evaluations: of the denoiser, each with one vector-Jacobian product
    per probe, or per dimension for the exact trace.
    """

    end_NCHW: Float64[Tensor, "N C H W"]
    gain_KN: Float64[Tensor, "K N"]
    num_evaluations: int


def slope_and_divergence(
    model: Denoiser,
    x_NCHW: Float[Tensor, "N C H W"],
    sigma: Float[Tensor, ""],
    labels: Tensor | None = None,
    probes_KNCHW: Float[Tensor, "K N C H W"] | None = None,
) -> tuple[Float64[Tensor, "N C H W"], Float64[Tensor, "K N"]]:
    """dx / d ln(sigma) = x - D(x; sigma), and its divergence d - tr(dD / dx) for images of d dimensions.

    probes_KNCHW: vectors v with E[v v^T] = I that estimate the trace, v^T (dD / dx) v (Hutchinson; arXiv 2011.13456,
    appendix D.2), by one vector-Jacobian product each; the d itself is not estimated. None takes the exact trace by d products.
    Raises CheckpointError where the result is not finite.
    """
    x_NCHW = x_NCHW.detach().double().requires_grad_()
    with torch.enable_grad():
        denoised_NCHW = denoise(model, x_NCHW, sigma, labels)
    trace_KN = _exact_trace(denoised_NCHW, x_NCHW) if probes_KNCHW is None else _traces(denoised_NCHW, x_NCHW, probes_KNCHW)
    slope_NCHW = (x_NCHW - denoised_NCHW).detach()
    if not bool(slope_NCHW.isfinite().all() & trace_KN.isfinite().all()):
        raise CheckpointError(
            f"the denoiser or its derivative is not finite at sigma {float(sigma):.4g}: the weights are damaged, or the model "
            "is not defined at this noise level; check it with a few samples, or give another sigma_min and sigma_max"
        )
    return slope_NCHW, x_NCHW[0].numel() - trace_KN


def _exact_trace(denoised_NCHW: Tensor, x_NCHW: Tensor) -> Tensor:
    trace_N, num = x_NCHW.new_zeros(len(x_NCHW)), x_NCHW[0].numel()
    for i in range(num):
        unit_ND = torch.zeros_like(x_NCHW).flatten(1)
        unit_ND[:, i] = 1
        trace_N = trace_N + _product(denoised_NCHW, x_NCHW, unit_ND.view_as(x_NCHW), keep=i < num - 1)
    return trace_N[None]


def _traces(denoised_NCHW: Tensor, x_NCHW: Tensor, probes_KNCHW: Tensor) -> Tensor:
    last = len(probes_KNCHW) - 1
    probes = enumerate(probes_KNCHW.double())
    return torch.stack([_product(denoised_NCHW, x_NCHW, probe_NCHW, keep=k < last) for k, probe_NCHW in probes])


def _product(denoised_NCHW: Tensor, x_NCHW: Tensor, v_NCHW: Tensor, keep: bool) -> Tensor:
    """v^T (dD / dx) v of each image."""
    if not denoised_NCHW.requires_grad:
        raise ConfigError("the denoiser's result has no gradient to its images: take torch.no_grad and detach out of it")
    (grad_NCHW,) = torch.autograd.grad(denoised_NCHW, x_NCHW, v_NCHW, retain_graph=keep)
    return (grad_NCHW * v_NCHW).flatten(1).sum(1)


@torch.no_grad()
def follow_ode(
    model: Denoiser,
    x_NCHW: Float[Tensor, "N C H W"],
    sigma_min: float,
    sigma_max: float,
    *,
    labels: Tensor | None = None,
    probes_KNCHW: Float[Tensor, "K N C H W"] | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-3,
) -> Path:
    """Carry images from sigma_min to sigma_max and integrate the divergence, with adaptive steps on the device.

    Solved for y = (x - x_start) / sigma and the gain per dimension in the time ln(sigma), by the third-order pair of Bogacki
    and Shampine. An error of x counts for much at sigma_min and for nothing at sigma_max; y is of order 1 throughout, so one
    tolerance fits all noise levels. On a network of 8x8 digits 74 evaluations leave an error of 3e-4 bits/dim; Dormand and
    Prince's pair in x, the official code's, needs 98 for 7e-4. Its time, sigma^(1/7), makes no difference to either.

    rtol, atol: bound the error of a step of every image, of y (root mean square) and of the gain in nats per dimension.
    Raises ConfigError if torchdiffeq is missing or the tolerance cannot be met, CheckpointError for a denoiser that is not
    finite.
    """
    start_NCHW, dims = x_NCHW.double(), x_NCHW[0].numel()
    num_evaluations = 0

    def derivative(time: Tensor, state: State) -> State:
        nonlocal num_evaluations
        num_evaluations += 1
        y_NCHW, sigma = state[0], time.exp()
        slope_NCHW, divergence_KN = slope_and_divergence(model, start_NCHW + sigma * y_NCHW, sigma, labels, probes_KNCHW)
        return slope_NCHW / sigma - y_NCHW, divergence_KN / dims

    gain_KN = start_NCHW.new_zeros(1 if probes_KNCHW is None else len(probes_KNCHW), len(x_NCHW))
    times = torch.tensor([sigma_min, sigma_max], dtype=torch.float64, device=x_NCHW.device).log()
    y_NCHW, gain_KN = _solve(derivative, (torch.zeros_like(start_NCHW), gain_KN), times, rtol, atol)
    return Path(start_NCHW + sigma_max * y_NCHW, gain_KN * dims, num_evaluations)


def _solve(derivative: Callable[[Tensor, State], State], state: State, times: Tensor, rtol: float, atol: float) -> State:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError(f"the likelihood needs the package torchdiffeq: pip install fastcm[likelihood] ({error})") from error
    # A step that ends at the last time: otherwise the solver evaluates beyond it and interpolates.
    options = {"norm": _worst_image, "step_t": times[-1:], "max_num_steps": MAX_SOLVER_STEPS}
    try:
        y, gain = odeint(derivative, state, times, rtol=rtol, atol=atol, method="bosh3", options=options)
    except AssertionError as error:  # what torchdiffeq raises for steps that are too small or too many
        raise ConfigError(
            f"rtol {rtol:g} and atol {atol:g} cannot be met ({error}): the network's rounding is larger"
        ) from error
    return y[-1], gain[-1]


def _worst_image(state: State) -> Tensor:
    """The largest of all images' errors, so that an image is solved no worse for the company it is in."""
    y_NCHW, gain_KN = state
    return torch.maximum(y_NCHW.flatten(1).square().mean(1).sqrt().amax(), gain_KN.abs().amax())


def prior_log_density(z_NCHW: Float[Tensor, "N C H W"], sigma_max: float) -> Float64[Tensor, " N"]:
    """log N(z; 0, sigma_max^2 I), nats: what p_sigma_max is taken to be.

    The data's own mean and variance are neglected. For pixels within [-1, 1] at sigma_max = 80 that is worth below 2e-4
    bits/dim on average, and about 0.02 / sqrt(d) at most for one image of d dimensions.
    """
    flat_ND = z_NCHW.double().flatten(1)
    return -0.5 * (flat_ND.shape[1] * math.log(2 * math.pi * sigma_max**2) + flat_ND.square().sum(1) / sigma_max**2)


@torch.no_grad()
def residual_nats(
    model: Denoiser,
    x0_NCHW: Float[Tensor, "N C H W"],
    noise_NCHW: Float[Tensor, "N C H W"],
    sigma: float,
    labels: Tensor | None = None,
) -> Float64[Tensor, " N"]:
    """The price in nats of going back from x = x0 + sigma noise to x0: -log p(x0 | x) + log q(x | x0), in expectation.

    |x0 - D(x; sigma)|^2 / (2 sigma^2) - d / 2 for the decoder N(x0; D(x; sigma), sigma^2 I) and q = N(x; x0, sigma^2 I) of d
    dimensions. -log p(x0) <= E[-log p_sigma(x) + residual], the variational bound that CTM's likelihood makes of sigma_min.
    """
    x0_NCHW = x0_NCHW.double()
    level = torch.tensor(sigma, dtype=torch.float64, device=x0_NCHW.device)
    denoised_NCHW = denoise(model, x0_NCHW + sigma * noise_NCHW.double(), level, labels)
    return 0.5 * ((x0_NCHW - denoised_NCHW).flatten(1).square().sum(1) / sigma**2 - x0_NCHW[0].numel())


def official_residual_sigma(sigma_min: float) -> float:
    """The noise level that CTM's official code takes the residual at: sigma_min^(1/7), 0.413 for its 0.00205.

    Its time is linear in sigma^(1/7); the power 7 that turns time into a noise level was left out in the residual alone.
    """
    return sigma_min ** (1 / OFFICIAL_RHO)
