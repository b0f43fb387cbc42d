"""Gamma-sampling of consistency trajectory models (arXiv 2310.02279, Algorithm 3): jumps, and noise between them."""

import math
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.sampling.common import Callback, NoiseSource, report, start


class Jumper(Protocol):
    """Anything that jumps along trajectories; ``fastcm.model.Model`` with a second time is one."""

    def jump(
        self, x: Float[Tensor, "N C H W"], t: Float[Tensor, " N"], s: Float[Tensor, " N"], **extra: Any
    ) -> Float[Tensor, "N C H W"]:
        """G(x, t, s): the images at noise level s on the trajectories through x at level t."""
        ...


@torch.no_grad()
def sample_trajectory(
    model: Jumper,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    *,
    gamma: float = 0.0,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    sigma_min: float | None = None,
) -> Float64[Tensor, "N C H W"]:
    """Jump below each further noise level, then add noise up to it: one network evaluation a level, S for S + 1 levels.

    x <- G(x, sigma_i, s_i), then x <- x + sqrt(sigma_(i+1)^2 - s_i^2) z, where
    s_i = sigma_min + sqrt(1 - gamma^2) (sigma_(i+1) - sigma_min). The last jump goes to the last level itself, and no noise
    follows. With sigma_min = 0 this is arXiv 2310.02279, Algorithm 3, whose noise is gamma sigma_(i+1) z; the published
    samplers have the smallest level that the network was trained to jump to, which is the default here,
    ``model.trajectory.sigma_min``, or 0 for a model that does not say.
    gamma 0: deterministic jumps on any grid, the "exact" sampler. gamma 1: consistency models' sampler, each time from
    sigma_min (arXiv 2303.01469, Algorithm 1).

    x: unit normal noise times sigmas[0]. sigmas: descending, to the level that the images are wanted at: 0, or the smallest
    one of the training. A grid on the CPU is checked; on a device that would wait for it.
    noise: needed for gamma > 0 and more than one jump; called with the number of the jump that follows, 1 first.
    callback: its "denoised" is G(x, sigma_i, s_i).
    Raises ConfigError for gamma outside [0, 1], a grid that does not descend, missing noise, or a model that cannot jump.
    """
    _require_jumps(model)
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma: expected 0 (deterministic) to 1 (noise up to every level), got {gamma}")
    floor = getattr(getattr(model, "trajectory", None), "sigma_min", 0.0) if sigma_min is None else sigma_min
    if not floor >= 0:
        raise ConfigError(f"sigma_min: expected at least 0, got {floor}")
    _check_levels(sigmas)
    x, sigmas = start(x, sigmas, noise, needs_noise=gamma > 0 and len(sigmas) > 2)
    num_jumps = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        noisy = gamma > 0 and i < num_jumps - 1
        s = below(sigma_next, gamma, floor) if noisy else sigma_next
        jumped = jump(model, x, sigma, s, labels)
        report(callback, i, x, sigma, sigma, jumped)
        x = jumped + (sigma_next**2 - s**2).sqrt() * noise(i + 1).double() if noisy else jumped
    return x


def jump(model: Jumper, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Float64[Tensor, "N C H W"]:
    """G(x, t, s) in fp64 from a network that is given fp32."""
    extra = {} if labels is None else {"labels": labels}
    return model.jump(x.float(), t.float().expand(len(x)), s.float().expand(len(x)), **extra).double()


def below(sigma: Float64[Tensor, ""], gamma: float, sigma_min: float) -> Float64[Tensor, ""]:
    """sigma_min + sqrt(1 - gamma^2) (sigma - sigma_min), the level to jump to before noise goes up to sigma.

    It is sigma itself where that is below sigma_min.
    """
    floor = sigma.clamp(max=sigma_min)
    return floor + math.sqrt(1 - gamma**2) * (sigma - floor)


def _require_jumps(model: Jumper) -> None:
    if not hasattr(model, "jump") or not getattr(model, "second_time", True):
        raise ConfigError(
            "sampler: trajectory jumps, which this model cannot: it has no network with a second time (second_time: true, "
            "as CTM's); use heun for a diffusion model or consistency for a consistency model"
        )


def _check_levels(sigmas: Tensor) -> None:
    if sigmas.device.type != "cpu" or sigmas.ndim != 1:
        return
    levels = sigmas.tolist()
    descending = all(high > low for high, low in pairwise(levels))  # so that NaN is refused too
    if not descending or levels[-1:] < [0.0] or math.inf in levels:
        listed = ", ".join(f"{level:.6g}" for level in levels)
        raise ConfigError(f"sigmas: noise levels must descend to 0 or above, got {listed}")
