"""Triton kernels of the forward pass: one program per image, or several with partial sums that a second kernel adds."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.elements import loop_format
from ..runtime.launch import Launch, ceil_div, next_power_of_2
from ..runtime.pinned import pinned
from .derivatives import Denoiser, Target
from .difference import difference, distance_of, shared_arguments

# Of one image; a sum over more is no longer one tile. Larger images give each program several tiles.
MAX_SPLITS = 1024
FINISH_TILE = 1024


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
    """S and loss of ROWS images from their partial sums, added in an order that does not depend on the batch."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLIT_BLOCK)
    is_row = row < num
    mask = is_row[:, None] & (split < SPLITS)[None, :]
    total = tl.sum(tl.load(partial_ptr + row[:, None] * SPLITS + split[None, :], mask=mask, other=0.0), axis=1)
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

    How an image is split depends on its size alone, so that its loss does not depend on its batch.
    Scratch: the partial sums, fp32 [N, splits], of images that one program does not hold.
    """
    arguments, elements = shared_arguments(student, target, distance, c, loop_format(student.F))
    chosen = pinned("consistency_loss", "forward", arch, elements=elements)
    block = min(chosen["block"], next_power_of_2(elements))
    tiles = max(1, ceil_div(elements, block * MAX_SPLITS))
    splits = max(1, ceil_div(elements, block * tiles))
    num = len(loss_N)
    outputs = {"weight_ptr": weight_N, "loss_ptr": loss_N, "squares_ptr": squares_N}
    partial_NS = torch.empty(num, splits, device=loss_N.device) if splits > 1 else None
    sizes = {"SPLITS": splits, "TILES": tiles, "BLOCK": block}
    main = Launch(
        loss_kernel, (num * splits,), {**arguments, **outputs, "partial_ptr": partial_NS, **sizes}, chosen["num_warps"]
    )
    if partial_NS is None:
        return [main]
    split_block = next_power_of_2(splits)
    rows = FINISH_TILE // split_block
    constants = {name: arguments[name] for name in ("SQUARED", "C", "C_SQUARED")}
    sizes = {"num": num, "SPLITS": splits, "SPLIT_BLOCK": split_block, "ROWS": rows}
    return [main, Launch(finish_kernel, (ceil_div(num, rows),), {"partial_ptr": partial_NS, **outputs, **constants, **sizes})]
