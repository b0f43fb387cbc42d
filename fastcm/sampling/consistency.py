"""Multistep consistency sampling (arXiv 2303.01469, Algorithm 1) and its grids of noise levels."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.sampling.common import Callback, Denoiser, NoiseSource, denoise, report, start

TWO_STEP_SIGMA = 0.821


@torch.no_grad()
def sample_consistency(
    model: Denoiser,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    *,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    sigma_min: float = 0.0,
) -> Float64[Tensor, "N C H W"]:
    """Denoise at the first level, then add noise up to each further level and denoise again: one evaluation per level.

    x <- D(x; sigma_i); x <- x + sqrt(sigma_(i+1)^2 - sigma_min^2) z. arXiv 2303.01469, Algorithm 1 with its epsilon as
    sigma_min; ECT (arXiv 2406.14548) uses 0.

    x: unit normal noise times sigmas[0]. sigmas: descending, the last one 0. noise: needed for more than one level;
    called with the number of the step that follows, 1 first.
    Raises ConfigError for a grid or noise that is missing.
    """
    x, sigmas = start(x, sigmas, noise, needs_noise=len(sigmas) > 2)
    for i, sigma in enumerate(sigmas[:-1]):
        if i > 0:
            x = x + (sigma**2 - sigma_min**2).clamp(min=0).sqrt() * noise(i).double()
        denoised = denoise(model, x, sigma, labels)
        report(callback, i, x, sigma, sigma, denoised)
        x = denoised
    return x


def consistency_sigmas(
    steps: int,
    mid_sigmas: Sequence[float] | None = None,
    sigma_max: float = 80.0,
    device: torch.device | str | None = None,
    last_sigma: float = TWO_STEP_SIGMA,
) -> Float64[Tensor, " S1"]:
    """sigma_max, then the steps - 1 intermediate noise levels, then 0.

    Without ``mid_sigmas`` the last intermediate level is ``last_sigma``, by default 0.821, the published choice for two
    steps on CIFAR-10 (arXiv 2310.14189 and 2406.14548); the others lie geometrically between sigma_max and it.
    Raises ConfigError for a number of levels that is not steps - 1 or for levels that do not descend.
    """
    if steps < 1:
        raise ConfigError(f"steps: expected at least 1, got {steps}")
    if mid_sigmas is None:
        ratio = last_sigma / sigma_max
        mid_sigmas = [sigma_max * ratio ** (i / (steps - 1)) for i in range(1, steps)]
    if len(mid_sigmas) != steps - 1:
        raise ConfigError(f"mid_sigmas: {steps} steps need {steps - 1} intermediate noise levels, got {len(mid_sigmas)}")
    levels = [sigma_max, *mid_sigmas, 0.0]
    if not all(high > low for high, low in pairwise(levels)):  # so that NaN is refused too
        raise ConfigError(
            f"mid_sigmas: noise levels must descend from sigma_max {sigma_max} to above 0, got {list(mid_sigmas)}"
        )
    return torch.tensor(levels, dtype=torch.float64, device=device)
