"""Images read element by element in one flat order, each from its own memory: for kernels that treat all elements alike.

An image of C channels and P = H W pixels is a matrix of rows and columns in the order of the loop: pixels of channels for
channels_last, channels of pixels for plain NCHW. Element e is column e % COLUMNS of row e // COLUMNS; ``load.py`` loads it.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor


class ElementStrides(NamedTuple):
    """Strides in elements from image to image, from pixel to pixel and from channel to channel."""

    stride_n: int
    stride_p: int
    stride_c: int


def element_strides(x_NCHW: Shaped[Tensor, "N C H W"]) -> ElementStrides | None:
    """The strides of images whose pixels are evenly spaced, whatever the order; None for any other memory (a crop)."""
    _, channels, height, width = x_NCHW.shape
    stride_n, stride_c, stride_h, stride_w = x_NCHW.stride()
    if width == 1:
        stride_w = stride_h
    elif height > 1 and stride_h != width * stride_w:
        return None
    # The stride of an axis of size 1 is arbitrary; these make such images dense.
    return ElementStrides(stride_n, stride_w if height * width > 1 else channels, stride_c if channels > 1 else 1)


def evenly_spaced(x_NCHW: Shaped[Tensor, "N C H W"]) -> Shaped[Tensor, "N C H W"]:
    """The images themselves where their pixels are evenly spaced, else a channels_last copy."""
    return x_NCHW if element_strides(x_NCHW) else x_NCHW.contiguous(memory_format=torch.channels_last)


def loop_format(x_NCHW: Shaped[Tensor, "N C H W"]) -> torch.memory_format:
    """The dense format in whose order these images are best read: NCHW for what is plainly NCHW, else channels_last."""
    is_nchw = x_NCHW.is_contiguous() and not x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if is_nchw else torch.channels_last


def image_arguments(name: str, x_NCHW: Shaped[Tensor, "N C H W"] | None, order: torch.memory_format) -> dict[str, Any]:
    """The kernel arguments of one evenly spaced image: ``_ptr``, ``_stride_n`` and the constants ``_ROW``, ``_COLUMN``."""
    if x_NCHW is None:
        return {f"{name}_ptr": None, f"{name}_stride_n": 0, f"{name}_ROW": 0, f"{name}_COLUMN": 0}
    stride_n, stride_p, stride_c = element_strides(x_NCHW)
    row, column = (stride_p, stride_c) if order == torch.channels_last else (stride_c, stride_p)
    return {f"{name}_ptr": x_NCHW, f"{name}_stride_n": stride_n, f"{name}_ROW": row, f"{name}_COLUMN": column}


def dense(x_NCHW: Shaped[Tensor, "N C H W"], format: torch.memory_format) -> Shaped[Tensor, "N C H W"]:
    """The images dense in a format, with the strides of ``torch.empty`` also on axes of size 1, where others would do."""
    strides = torch.empty(x_NCHW.shape, device="meta", memory_format=format).stride()
    return x_NCHW.contiguous(memory_format=format).as_strided(x_NCHW.shape, strides)
