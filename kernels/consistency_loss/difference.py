"""What the kernels of all passes share: v = D_t - target of a tile, the distance and its slope, the arguments."""

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Shaped
from torch import Tensor

from ..runtime.elements import image_arguments
from ..runtime.load import load_elements
from .derivatives import Denoiser, Target


# One line per tensor.
# fmt: off
@triton.jit
def difference(
    n, element, mask, COLUMNS: tl.constexpr,
    F_t_ptr, F_t_stride_n, F_t_ROW: tl.constexpr, F_t_COLUMN: tl.constexpr,
    x_t_ptr, x_t_stride_n, x_t_ROW: tl.constexpr, x_t_COLUMN: tl.constexpr,
    c_skip_t_ptr, c_out_t_ptr,
    clean_ptr, clean_stride_n, clean_ROW: tl.constexpr, clean_COLUMN: tl.constexpr,
    F_r_ptr, F_r_stride_n, F_r_ROW: tl.constexpr, F_r_COLUMN: tl.constexpr,
    x_r_ptr, x_r_stride_n, x_r_ROW: tl.constexpr, x_r_COLUMN: tl.constexpr,
    c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
):
    """v = c_skip_t x_t + c_out_t F_t - target of elements of image n, 0 outside the mask; arXiv 2206.00364, Eq. 7.

    The target is the clean image where there is no teacher or the row is at the boundary; only one of the two is read.
    """
    F_t = load_elements(F_t_ptr, n, F_t_stride_n, element, mask, COLUMNS, F_t_ROW, F_t_COLUMN)
    x_t = load_elements(x_t_ptr, n, x_t_stride_n, element, mask, COLUMNS, x_t_ROW, x_t_COLUMN)
    if F_r_ptr is None:
        target = load_elements(clean_ptr, n, clean_stride_n, element, mask, COLUMNS, clean_ROW, clean_COLUMN)
    else:
        inner = mask
        if boundary_ptr is not None:
            is_clean = tl.load(boundary_ptr + n) != 0
            inner = mask & (is_clean == 0)
            of_clean = mask & is_clean
            clean = load_elements(clean_ptr, n, clean_stride_n, element, of_clean, COLUMNS, clean_ROW, clean_COLUMN)
        F_r = load_elements(F_r_ptr, n, F_r_stride_n, element, inner, COLUMNS, F_r_ROW, F_r_COLUMN)
        x_r = load_elements(x_r_ptr, n, x_r_stride_n, element, inner, COLUMNS, x_r_ROW, x_r_COLUMN)
        target = tl.load(c_skip_r_ptr + n) * x_r + tl.load(c_out_r_ptr + n) * F_r
        if boundary_ptr is not None:
            target = tl.where(is_clean, clean, target)
    return tl.load(c_skip_t_ptr + n) * x_t + tl.load(c_out_t_ptr + n) * F_t - target
# fmt: on


# Below it a sum counts as 0: the root of some releases of Triton flushes what is not normal to 0, and 0 / 0 is no distance.
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def distance_of(squares, SQUARED: tl.constexpr, C: tl.constexpr, C_SQUARED: tl.constexpr):
    """d(S): S, or sqrt(S + c^2) - c without its cancellation at small S; arXiv 2310.14189, section 3.3."""
    if SQUARED:
        return squares
    radicand = squares + C_SQUARED
    is_zero = radicand < SMALLEST_NORMAL
    root = tl.sqrt_rn(tl.where(is_zero, 1.0, radicand))
    return tl.where(is_zero, 0.0, tl.div_rn(squares, root + C))


@triton.jit
def slope_of(squares, SQUARED: tl.constexpr, C_SQUARED: tl.constexpr):
    """h(S) = 2 d'(S), finite where the root is 0 and NaN where S has overflowed, as in ``derivatives.slope``."""
    if SQUARED:
        return squares * 0.0 + 2.0
    radicand = squares + C_SQUARED
    root = tl.sqrt_rn(tl.where(radicand < SMALLEST_NORMAL, 1.0, radicand))
    return tl.div_rn(tl.full((), 1.0, tl.float32), root) + 0.0 * squares


def shared_arguments(
    student: Denoiser, target: Target, distance: str, c: float, order: torch.memory_format
) -> tuple[dict[str, Any], int]:
    """The arguments that all kernels take, and the elements of one image; images evenly spaced, [N] contiguous fp32."""
    _, channels, height, width = student.F.shape
    F_r, x_r, c_skip_r, c_out_r = target.teacher or (None,) * 4
    images = {"F_t": student.F, "x_t": student.x, "clean": target.clean, "F_r": F_r, "x_r": x_r}
    squared, elements = distance == "squared", channels * height * width
    c = c if distance == "pseudo_huber" else 0.0
    arguments = {
        "c_skip_t_ptr": student.c_skip,
        "c_out_t_ptr": student.c_out,
        "c_skip_r_ptr": c_skip_r,
        "c_out_r_ptr": c_out_r,
        "boundary_ptr": None if F_r is None else _as_bytes(target.boundary_N),
        "COLUMNS": channels if order == torch.channels_last else height * width,
        "ELEMENTS": elements,
        "SQUARED": squared,
        "C": as_fp32(c),
        "C_SQUARED": as_fp32(c * c),
    }
    for name, image in images.items():
        arguments |= image_arguments(name, image, order)
    return arguments, elements


def _as_bytes(mask_N: Tensor | None) -> Shaped[Tensor, " N"] | None:
    return None if mask_N is None else mask_N.view(torch.uint8)


def as_fp32(value: float) -> float:
    """A number rounded to fp32, so that a constant below its range is the 0 that PyTorch computes with."""
    return struct.unpack("f", struct.pack("f", value))[0]
