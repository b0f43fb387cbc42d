"""Ancestral sampling: Euler's steps with fresh noise after each (arXiv 2006.11239, 2011.13456, 2010.02502)."""

from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.sampling.common import Callback, Denoiser, NoiseSource, denoise, report, round_sigmas, start


@torch.no_grad()
def sample_ancestral(
    model: Denoiser,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    *,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
) -> Float64[Tensor, "N C H W"]:
    """Step below each noise level, then add noise up to it: one network evaluation a level.

    x <- x + (sigma_down - sigma_i) (x - D(x; sigma_i)) / sigma_i, then x <- x + sigma_up z with
    sigma_up = eta sigma_(i+1) sqrt(1 - sigma_(i+1)^2 / sigma_i^2) and sigma_down^2 + sigma_up^2 = sigma_(i+1)^2.
    At eta = 1 this draws from q(x_(i+1) | x_i, x_0 = D), the ancestral sampler of DDPM (arXiv 2006.11239, Algorithm 2) in the
    variables of arXiv 2206.00364 (arXiv 2011.13456, Eq. 47); at eta = 0 it is ``sample_euler``; between them DDIM's eta
    (arXiv 2010.02502, Eq. 16).

    x: unit normal noise times sigmas[0]. sigmas: descending, the last one 0. noise: needed for eta > 0.
    Raises ConfigError for eta outside [0, 1], and for a grid or noise that is missing.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta: expected 0 (no noise, Euler's method) to 1 (ancestral sampling), got {eta}")
    x, sigmas = start(x, sigmas, noise, needs_noise=eta > 0)
    sigmas = round_sigmas(model, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(model, x, sigma, labels)
        report(callback, i, x, sigma, sigma, denoised)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = x + (sigma_down - sigma) * (x - denoised) / sigma
        if eta > 0:
            x = x + sigma_up * noise(i).double()
    return x


def ancestral_step(
    sigma: Float64[Tensor, "..."], sigma_next: Float64[Tensor, "..."], eta: float = 1.0
) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
    """(sigma_down, sigma_up): the level that the step goes down to, and the standard deviation of the noise that follows."""
    share = eta**2 * (1 - (sigma_next / sigma) ** 2)
    return sigma_next * (1 - share).sqrt(), sigma_next * share.sqrt()
