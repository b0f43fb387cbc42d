"""Continuous images from discrete ones, so that a density says something about their probability."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from fastcm.errors import ConfigError, DataError
from fastcm.random import Stream

# A pixel may be this part of the distance between two levels away from its level: 17 levels stored in 8 bits are 0.03 away.
MAX_OFF_LEVEL = 0.1


class Dequantized(NamedTuple):
    """Images to evaluate a density p at, and what turns it into bits/dim: -log2 p / d + offset_bits."""

    images_NCHW: Float64[Tensor, "N C H W"]
    offset_bits: float


def dequantized(
    images_NCHW: Float[Tensor, "N C H W"],
    mode: Literal["uniform", "truncated_normal", "none"],
    levels: int | None,
    sigma: float,
    seed: int,
    index_N: Int64[Tensor, " N"],
) -> Dequantized:
    """Add noise within the bins, of width w = 2 / (levels - 1), around the levels; all modes bound the same -log2 P(image) / d.

    "uniform": noise uniform on [-w / 2, w / 2]; offset -log2(w), 6.994 for 8 bits. It lies around each level, where published
    figures map [-1, 1 + w] onto [-1, 1] with an offset of 7: the same for a density that is smooth within a bin.
    "truncated_normal": N(0, sigma^2) cut to the bin, the noise that a model trained on discrete images knows, as in arXiv
    2305.03935; the offset is minus its entropy in bits, H = ln(sqrt(2 pi e) sigma Z) - tau phi(tau) / Z for
    tau = w / (2 sigma), Z = erf(tau / sqrt(2)).
    "none": images are continuous already; offset log2(levels / 2), the 7 of published figures for 8 bits, or 0 for levels
    None, which leaves the density on [-1, 1] itself.

    Noise depends on seed and index alone, stream "dequantize". Raises ConfigError for an unknown mode or number of levels,
    DataError for images that are not on the levels.
    """
    if mode not in ("uniform", "truncated_normal", "none"):
        raise ConfigError(f"dequantize: expected uniform, truncated_normal or none, got {mode!r}")
    if levels < 2 if levels is not None else mode != "none":
        raise ConfigError(f"levels: {mode!r} needs the number of values that a pixel can have, at least 2, got {levels}")
    images_NCHW = images_NCHW.double()
    if mode == "none":
        return Dequantized(images_NCHW, math.log2(levels / 2) if levels else 0.0)
    width = 2 / (levels - 1)
    shape = tuple(images_NCHW.shape[1:])
    u_NHWC = Stream(seed, "dequantize").uniform(index_N, (shape[1], shape[2], shape[0])).double() + 2**-25
    u_NCHW, centres_NCHW = u_NHWC.permute(0, 3, 1, 2), _on_levels(images_NCHW, levels)
    if mode == "uniform":
        return Dequantized(centres_NCHW + (u_NCHW - 0.5) * width, -math.log2(width))
    tau = width / (2 * sigma)
    inside = math.erf(tau / math.sqrt(2))
    noise_NCHW = math.sqrt(2) * torch.erfinv((2 * u_NCHW - 1) * inside)
    entropy = math.log(math.sqrt(2 * math.pi * math.e) * sigma * inside)
    entropy -= tau * math.exp(-0.5 * tau**2) / (math.sqrt(2 * math.pi) * inside)
    return Dequantized(centres_NCHW + sigma * noise_NCHW, -entropy / math.log(2))


def _on_levels(images_NCHW: Tensor, levels: int) -> Tensor:
    """The images with every pixel exactly on its level."""
    position_NCHW = (images_NCHW + 1) / 2 * (levels - 1)
    nearest_NCHW = position_NCHW.round()
    off = float((position_NCHW - nearest_NCHW).abs().max())
    if off > MAX_OFF_LEVEL:
        raise DataError(
            f"images are not on {levels} levels from -1 to 1: a pixel is {off:.2f} of the distance between two levels from its "
            "own; give the right number of levels, or dequantize='none' for continuous images"
        )
    return nearest_NCHW * 2 / (levels - 1) - 1
