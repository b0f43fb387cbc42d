"""What a freshly written bundle has to show: the source's tensors bit for bit, and images that are finite."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fastcm.convert.source import as_float32
from fastcm.errors import CheckpointError
from fastcm.io.bundle import load
from fastcm.model import Model
from fastcm.random import Stream

LEVELS = (0.01, 1.0, 80.0)
# |D(x; s) - x| is about s |F|, and a trained F predicts something of unit size.
NEAR = 3.0


@dataclass(frozen=True)
class Checked:
    """num_tensors were compared; D was finite at ``levels``; ``distance`` = rms(D(x; s) - x) at the first of them."""

    num_tensors: int
    levels: tuple[float, ...]
    distance: float

    def lines(self) -> list[str]:
        """What was shown, in words."""
        smallest = self.levels[0]
        near = self.distance <= NEAR * smallest
        verdict = "within 3 sigma, as it should be" if near else "beyond 3 sigma: random weights, or other scalings?"
        return [
            f"check: {self.num_tensors} tensors of the bundle give the source back bit for bit",
            f"check: D(x; sigma) is finite at sigma {', '.join(f'{level:.4g}' for level in self.levels)}",
            f"check: D(x; {smallest:.4g}) is {self.distance:.2g} (rms) away from x, {verdict}",
        ]


def check_bundle(
    path: Path, source: Mapping[str, Shaped[Tensor, "..."]], official: Callable[[Model], Mapping[str, Shaped[Tensor, "..."]]]
) -> Checked:
    """Load a bundle and compare ``official(model)``, its tensors under the names of ``source``, with those bit by bit.

    Then run it once at three noise levels. Raises CheckpointError naming the tensor that differs, or the level at which the
    result is not finite.
    """
    model = load(path)
    returned = as_float32(official(model))
    for name, value in as_float32(source).items():
        if name not in returned or not _same_bits(value, returned[name]):
            raise CheckpointError(f"self-check: {name} does not come back from the bundle; please report this")
    return Checked(len(source), *_denoise(model))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@torch.no_grad()
def _denoise(model: Model) -> tuple[tuple[float, ...], float]:
    """The noise levels, and the distance of D(x; sigma) from x at the smallest."""
    noise = Stream(0, "convert").image_normal(torch.zeros(1, dtype=torch.int64), model.image_shape)
    clean = torch.linspace(-1, 1, model.image_shape[2]).expand(noise.shape)
    inside = torch.tensor([min(max(level, model.sigma_min), model.sigma_max) for level in LEVELS])
    levels = tuple(model.round_sigma(inside).tolist())
    distances = [_distance(model, clean + level * noise, level) for level in levels]
    return levels, distances[0]


def _distance(model: Model, x_NCHW: Float[Tensor, "N C H W"], sigma: float) -> float:
    denoised = model(x_NCHW, sigma)
    if not denoised.isfinite().all():
        raise CheckpointError(f"self-check: the model's images are not finite at sigma {sigma:.4g}; its weights are damaged")
    return (denoised - x_NCHW).square().mean().sqrt().item()
