"""EDM's samplers: Heun's method, deterministic or with churn (arXiv 2206.00364, Algorithms 1 and 2)."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.sampling.churn import Churn
from fastcm.sampling.common import Callback, Denoiser, NoiseSource, denoise, report, round_sigmas, start


@torch.no_grad()
def sample_heun(
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
) -> Float64[Tensor, "N C H W"]:
    """Walk down the noise levels by Heun's second-order method: 2 S - 1 network evaluations for S levels above 0.

    Each step raises sigma_i to sigma_hat with fresh noise, see ``Churn``, then solves
    dx / dsigma = (x - D(x; sigma)) / sigma to sigma_(i+1). arXiv 2206.00364, Algorithm 2 (Algorithm 1 at s_churn = 0).

    x: unit normal noise times sigmas[0]. sigmas: descending, the last one 0. noise: needed for s_churn > 0.
    Raises ConfigError for a grid or noise that is missing, and for s_churn, s_tmin, s_tmax, s_noise that cannot work.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    x, sigmas = start(x, sigmas, noise, needs_noise=s_churn > 0)
    sigmas = round_sigmas(model, sigmas)
    num_steps = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn.raise_noise(model, x, sigma, num_steps, noise, i)
        denoised = denoise(model, x, sigma_hat, labels)
        report(callback, i, x, sigma, sigma_hat, denoised)
        slope = (x - denoised) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * slope
        if i < num_steps - 1:
            slope_next = (x_next - denoise(model, x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        x = x_next
    return x


@torch.no_grad()
def sample_euler(
    model: Denoiser,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    *,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Float64[Tensor, "N C H W"]:
    """Walk down the noise levels by Euler's method, one network evaluation a level: DDIM in the variables of EDM.

    x <- x + (sigma_(i+1) - sigma_i) (x - D(x; sigma_i)) / sigma_i; arXiv 2206.00364, Algorithm 1 without lines 6 to 8.
    Arguments as in ``sample_heun``; ``noise`` is not used. Raises ConfigError for a grid without a step.
    """
    x, sigmas = start(x, sigmas, noise, needs_noise=False)
    sigmas = round_sigmas(model, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(model, x, sigma, labels)
        report(callback, i, x, sigma, sigma, denoised)
        x = x + (sigma_next - sigma) * (x - denoised) / sigma
    return x
