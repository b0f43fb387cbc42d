"""What all samplers share: the denoiser's calling convention, its noise levels and the source of fresh noise.

The convention is k-diffusion's: ``model(x, sigma, **extra)`` gives the denoised x; sigmas descend and end in 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError

# Called with the number of a step, gives fresh unit normal noise like x.
NoiseSource = Callable[[int], Tensor]
# Called once a step with what k-diffusion hands out: x, i, sigma, sigma_hat, denoised.
Callback = Callable[[Mapping[str, Any]], None]


class Denoiser(Protocol):
    """Any denoiser of k-diffusion's convention; ``fastcm.model.Model`` is one."""

    def __call__(self, x: Float[Tensor, "N C H W"], sigma: Float[Tensor, " N"], **extra: Any) -> Float[Tensor, "N C H W"]:
        """The denoised images."""
        ...


def denoise(model: Denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Float64[Tensor, "N C H W"]:
    """D(x; sigma) in fp64 from a network that is given fp32."""
    extra = {} if labels is None else {"labels": labels}
    return model(x.float(), sigma.float().expand(len(x)), **extra).double()


def round_sigmas(model: Denoiser, sigma: Tensor) -> Tensor:
    """The nearest noise levels that the model was trained on; the levels themselves if it does not say."""
    rounding = getattr(model, "round_sigma", None)
    return sigma if rounding is None else rounding(sigma)


def clip_range(model: Denoiser, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The part of [sigma_min, sigma_max] on which the model is defined; all of it if it does not say."""
    low, high = getattr(model, "sigma_min", 0.0), getattr(model, "sigma_max", math.inf)
    return max(sigma_min, low), min(sigma_max, high)


def start(x: Tensor, sigmas: Tensor, noise: NoiseSource | None, needs_noise: bool) -> tuple[Tensor, Tensor]:
    """Check a sampler's arguments and give (x, sigmas) in fp64 on the device of x.

    Raises ConfigError for a grid without a step or for missing noise.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ConfigError(f"sigmas: expected at least one noise level and the final 0, got shape {tuple(sigmas.shape)}")
    if needs_noise and noise is None:
        raise ConfigError("noise: this sampler adds fresh noise; give a function from the step number to unit normals like x")
    return x.double(), sigmas.to(x.device, torch.float64)


def report(callback: Callback | None, i: int, x: Tensor, sigma: Tensor, sigma_hat: Tensor, denoised: Tensor) -> None:
    """Hand the state of step i to the callback, if there is one."""
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})
