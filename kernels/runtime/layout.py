"""How images lie in memory: kernels read channels that are neighbours, pixels at any one distance."""

from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor


class PixelLayout(NamedTuple):
    """Strides in elements from one image to the next and from one pixel to the next; channels are neighbours."""

    stride_n: int
    stride_p: int


def pixel_layout(x_NCHW: Shaped[Tensor, "N C H W"]) -> PixelLayout | None:
    """The layout of images whose channels are neighbours and whose pixels are evenly spaced; None for any other memory."""
    _, channels, height, width = x_NCHW.shape
    stride_n, stride_c, stride_h, stride_w = x_NCHW.stride()
    if channels > 1 and stride_c != 1:
        return None
    if width == 1:
        stride_w = stride_h
    if height > 1 and width > 1 and stride_h != width * stride_w:
        return None
    return PixelLayout(stride_n, stride_w if height * width > 1 else channels)


def channels_last(x_NCHW: Shaped[Tensor, "N C H W"]) -> tuple[Shaped[Tensor, "N C H W"], PixelLayout]:
    """The images in a memory that kernels can read, copied only where that is needed, and their layout.

    A slice of channels of channels_last images (what the backward of ``torch.cat`` hands out) is read in place.
    """
    layout = pixel_layout(x_NCHW)
    if layout is None:
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        channels, height, width = x_NCHW.shape[1:]
        layout = PixelLayout(height * width * channels, channels)
    return x_NCHW, layout
