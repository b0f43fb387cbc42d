"""Noise and input preconditioning in plain PyTorch: the numbers that every backend must reproduce.

Shapes: N samples, C channels, H by W pixels. Arithmetic is fp32, or fp64 for fp64 images.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..philox import PhiloxKey, random_normal


class NoisedInputs(NamedTuple):
    """Images at one or two noise levels, and what the network is given of them; the second pair is None without a second level.

    x_t, x_r: fp32 (fp64 for fp64 images); input_t, input_r: the dtype asked for. All are channels_last.
    """

    x_t: Float[Tensor, "N C H W"]
    input_t: Float[Tensor, "N C H W"]
    x_r: Float[Tensor, "N C H W"] | None = None
    input_r: Float[Tensor, "N C H W"] | None = None


def add_noise(
    clean_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    c_in_t_N: Float[Tensor, " N"],
    *,
    r_N: Float[Tensor, " N"] | None = None,
    c_in_r_N: Float[Tensor, " N"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> NoisedInputs:
    """Noise images to one or two levels with the same noise, and scale them for the network.

    x_t = y + t n, input_t = c_in_t x_t rounded once to ``dtype``; x_r and input_r the same at level r (arXiv 2206.00364,
    Eq. 7; the shared noise: arXiv 2303.01469, Eq. 10). n is standard normal: given as images, or drawn from a key, where
    element e = (h W + w) C + c of a sample is element e of ``random_normal``.

    Arguments: images [N, C, H, W] of any float dtype; levels and scalings [N]; r_N and c_in_r_N together or not at all.
    Raises ValueError when only one of them is given.
    """
    check_levels(r_N, c_in_r_N)
    noise_NCHW = noise if isinstance(noise, Tensor) else normal_images(noise, clean_NCHW)
    clean_NCHW, noise_NCHW = _at_least_fp32(clean_NCHW), _at_least_fp32(noise_NCHW)
    at_t = _noised(clean_NCHW, noise_NCHW, t_N, c_in_t_N, dtype)
    return NoisedInputs(*at_t, *(() if r_N is None else _noised(clean_NCHW, noise_NCHW, r_N, c_in_r_N, dtype)))


def check_levels(r_N: Float[Tensor, " N"] | None, c_in_r_N: Float[Tensor, " N"] | None) -> None:
    """Raise ValueError unless a second noise level comes with its input scaling, or neither is there."""
    if (r_N is None) != (c_in_r_N is None):
        missing, given = ("c_in_r_N", "r_N") if c_in_r_N is None else ("r_N", "c_in_r_N")
        raise ValueError(f"{given} is given and {missing} is None: a second noise level needs both")


def normal_images(key: PhiloxKey, like_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """Standard normal fp32 images of a shape, channels_last, elements counted in (H, W, C) order."""
    _, channels, height, width = like_NCHW.shape
    normal = random_normal(key, height * width * channels)
    return normal.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


def _noised(clean: Tensor, noise: Tensor, level_N: Tensor, c_in_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    level_N, c_in_N = (_at_least_fp32(value_N)[:, None, None, None] for value_N in (level_N, c_in_N))
    x_NCHW = (clean + level_N * noise).to(clean.dtype).contiguous(memory_format=torch.channels_last)
    return x_NCHW, (c_in_N * x_NCHW).to(dtype, memory_format=torch.channels_last)


def _at_least_fp32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
