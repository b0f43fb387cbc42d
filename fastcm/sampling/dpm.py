"""DPM-Solver-2, deterministic or with churn (arXiv 2206.00927, Algorithm 1; arXiv 2206.00364, Algorithm 2)."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.sampling.churn import Churn
from fastcm.sampling.common import Callback, Denoiser, NoiseSource, clip_range, denoise, report, round_sigmas, start

MAX_MIDPOINT_RHO = 10.0  # the last midpoint is 2^-rho of the smallest level, and what is divided by it has errors of fp32


@torch.no_grad()
def sample_dpm(
    model: Denoiser,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    *,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    midpoint_rho: float = math.inf,
) -> Float64[Tensor, "N C H W"]:
    """Walk down the noise levels by the midpoint method: 2 S - 1 network evaluations for S levels above 0.

    Each step raises sigma_i to sigma_hat with fresh noise, see ``Churn``, then goes to sigma_(i+1) along the slope
    (x - D(x; sigma)) / sigma at sigma_mid, which Euler's step leads to. sigma_mid = sqrt(sigma_hat sigma_(i+1)) is halfway in
    log sigma: DPM-Solver-2 (arXiv 2206.00927, Algorithm 1, r_1 = 1/2) in the variables of arXiv 2206.00364; the last step,
    to 0, has no such place and is Euler's.

    midpoint_rho: take sigma_mid halfway in sigma^(1 / midpoint_rho) instead, also in the last step, with 2 S evaluations. The
    consistency models' code (arXiv 2303.01469) has 3, whose last midpoint lies at an eighth of the smallest level; where the
    model's own smallest level is higher, at that.
    Other arguments and errors as in ``sample_heun``. Raises ConfigError also for a midpoint_rho outside [1, 10].
    """
    if not (1 <= midpoint_rho <= MAX_MIDPOINT_RHO or midpoint_rho == math.inf):
        expected = f"a number from 1 to {MAX_MIDPOINT_RHO:g}, or inf for halfway in log sigma"
        raise ConfigError(f"midpoint_rho: expected {expected}, got {midpoint_rho}")
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    x, sigmas = start(x, sigmas, noise, needs_noise=s_churn > 0)
    sigmas = round_sigmas(model, sigmas)
    num_steps, (lowest, _) = len(sigmas) - 1, clip_range(model, 0.0, math.inf)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn.raise_noise(model, x, sigma, num_steps, noise, i)
        denoised = denoise(model, x, sigma_hat, labels)
        report(callback, i, x, sigma, sigma_hat, denoised)
        slope = (x - denoised) / sigma_hat
        if i < num_steps - 1 or midpoint_rho < math.inf:
            sigma_mid = midpoint(sigma_hat, sigma_next, midpoint_rho).clamp(min=lowest)
            sigma_mid = round_sigmas(model, sigma_mid)
            x_mid = x + (sigma_mid - sigma_hat) * slope
            slope = (x_mid - denoise(model, x_mid, sigma_mid, labels)) / sigma_mid
        x = x + (sigma_next - sigma_hat) * slope
    return x


def midpoint(high: Float64[Tensor, ""], low: Float64[Tensor, ""], rho: float) -> Float64[Tensor, ""]:
    """((high^(1 / rho) + low^(1 / rho)) / 2)^rho, and its limit sqrt(high low) for rho = inf."""
    if math.isinf(rho):
        return (high * low).sqrt()
    return ((high ** (1 / rho) + low ** (1 / rho)) / 2) ** rho
