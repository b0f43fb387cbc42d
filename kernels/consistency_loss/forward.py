"""Triton kernels of the forward pass: one program per image, or several with partial sums that a second kernel adds."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.elements import loop_format
from ..runtime.launch import Launch
from .derivatives import Denoiser, Target
from .difference import difference, distance_of, shared_arguments
from .split import split_image, sum_of_parts


# One line per tensor.
# fmt: off
@triton.jit
def loss_kernel(
    F_t_ptr, F_t_stride_n, F_t_ROW: tl.constexpr, F_t_COLUMN: tl.constexpr,
    x_t_ptr, x_t_stride_n, x_t_ROW: tl.constexpr, x_t_COLUMN: tl.constexpr,
    c_skip_t_ptr, c_out_t_ptr,
    clean_ptr, clean_stride_n, clean_ROW: tl.constexpr, clean_COLUMN: tl.constexpr,
    F_r_ptr, F_r_stride_n, F_r_ROW: tl.constexpr, F_r_COLUMN: tl.constexpr,
    x_r_ptr, x_r_stride_n, x_r_ROW: tl.constexpr, x_r_COLUMN: tl.constexpr,
    c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
    weight_ptr, loss_ptr, squares_ptr, partial_ptr,
    SQUARED: tl.constexpr, C: tl.constexpr, C_SQUARED: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    """S and loss of one image where SPLITS is 1, else the part of S that TILES tiles of BLOCK elements give."""
    program = tl.program_id(0)
    n, split = (program // SPLITS).to(tl.int64), program % SPLITS
    squares = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        element = (split * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        v = difference(
            n, element, element < ELEMENTS, COLUMNS,
            F_t_ptr, F_t_stride_n, F_t_ROW, F_t_COLUMN, x_t_ptr, x_t_stride_n, x_t_ROW, x_t_COLUMN,
            c_skip_t_ptr, c_out_t_ptr, clean_ptr, clean_stride_n, clean_ROW, clean_COLUMN,
            F_r_ptr, F_r_stride_n, F_r_ROW, F_r_COLUMN, x_r_ptr, x_r_stride_n, x_r_ROW, x_r_COLUMN,
            c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
        )
        squares += v * v
    total = tl.sum(squares)
    if SPLITS == 1:
        tl.store(squares_ptr + n, total)
        tl.store(loss_ptr + n, tl.load(weight_ptr + n) * distance_of(total, SQUARED, C, C_SQUARED))
    else:
        tl.store(partial_ptr + n * SPLITS + split, total)
# fmt: on


@triton.jit
def finish_kernel(
    partial_ptr,
    weight_ptr,
    loss_ptr,
    squares_ptr,
    num,
    SQUARED: tl.constexpr,
    C: tl.constexpr,
    C_SQUARED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """S and loss of ROWS images from their partial sums."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num
    total = sum_of_parts(partial_ptr, row, is_row, SPLITS, SPLIT_BLOCK)
    tl.store(squares_ptr + row, total, mask=is_row)
    weight = tl.load(weight_ptr + row, mask=is_row)
    tl.store(loss_ptr + row, weight * distance_of(total, SQUARED, C, C_SQUARED), mask=is_row)


def forward_launches(
    student: Denoiser,
    target: Target,
    weight_N: Float[Tensor, " N"],
    distance: str,
    c: float,
    loss_N: Float[Tensor, " N"],
    squares_N: Float[Tensor, " N"],
    arch: str,
) -> list[Launch]:
    """The launches that fill ``loss_N`` and ``squares_N``; images evenly spaced, [N] vectors contiguous and fp32.

    Scratch: the partial sums, fp32 [N, splits], of images that one program does not hold.
    """
    arguments, elements = shared_arguments(student, target, distance, c, loop_format(student.F))
    split, num = split_image("forward", elements, arch), len(loss_N)
    partial_NS = torch.empty(num, split.splits, device=loss_N.device) if split.splits > 1 else None
    outputs = {"weight_ptr": weight_N, "loss_ptr": loss_N, "squares_ptr": squares_N, "partial_ptr": partial_NS}
    main = split.launch(loss_kernel, num, arguments | outputs)
    if partial_NS is None:
        return [main]
    constants = {name: arguments[name] for name in ("SQUARED", "C", "C_SQUARED")}
    return [main, split.finish(finish_kernel, num, outputs | constants)]
