"""Triton kernels that take a tangent along: the loss and dL = w h(S) <v, c_out tF + c_skip tx> + tw d(S) in one pass.

The inner product is a second sum beside S over the same elements, cut over programs in the same way.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.elements import image_arguments, loop_format
from ..runtime.launch import Launch
from ..runtime.load import load_elements
from .derivatives import Denoiser, Tangents, Target
from .difference import difference, distance_of, shared_arguments, slope_of
from .split import split_image, sum_of_parts


@triton.jit
def store_dual(
    squares,
    product,
    row,
    mask,
    weight_ptr,
    tweight_ptr,
    loss_ptr,
    tangent_ptr,
    SQUARED: tl.constexpr,
    C: tl.constexpr,
    C_SQUARED: tl.constexpr,
):
    """Loss and tangent of rows from S and <v, tD>."""
    distance, weight = distance_of(squares, SQUARED, C, C_SQUARED), tl.load(weight_ptr + row, mask=mask)
    tangent = weight * slope_of(squares, SQUARED, C_SQUARED) * product
    if tweight_ptr is not None:
        tangent += tl.load(tweight_ptr + row, mask=mask) * distance
    tl.store(loss_ptr + row, weight * distance, mask=mask)
    tl.store(tangent_ptr + row, tangent, mask=mask)


# One line per tensor.
# fmt: off
@triton.jit
def loss_jvp_kernel(
    F_t_ptr, F_t_stride_n, F_t_ROW: tl.constexpr, F_t_COLUMN: tl.constexpr,
    x_t_ptr, x_t_stride_n, x_t_ROW: tl.constexpr, x_t_COLUMN: tl.constexpr,
    c_skip_t_ptr, c_out_t_ptr,
    clean_ptr, clean_stride_n, clean_ROW: tl.constexpr, clean_COLUMN: tl.constexpr,
    F_r_ptr, F_r_stride_n, F_r_ROW: tl.constexpr, F_r_COLUMN: tl.constexpr,
    x_r_ptr, x_r_stride_n, x_r_ROW: tl.constexpr, x_r_COLUMN: tl.constexpr,
    c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
    tF_ptr, tF_stride_n, tF_ROW: tl.constexpr, tF_COLUMN: tl.constexpr,
    tx_ptr, tx_stride_n, tx_ROW: tl.constexpr, tx_COLUMN: tl.constexpr,
    weight_ptr, tweight_ptr, loss_ptr, tangent_ptr, partial_ptr,
    SQUARED: tl.constexpr, C: tl.constexpr, C_SQUARED: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Loss and tangent of one image where SPLITS is 1, else its parts of S and <v, tD>; tD = c_out tF + c_skip tx."""
    program = tl.program_id(0)
    n, split = (program // SPLITS).to(tl.int64), program % SPLITS
    squares, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        element = (split * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = element < ELEMENTS
        v = difference(
            n, element, mask, COLUMNS,
            F_t_ptr, F_t_stride_n, F_t_ROW, F_t_COLUMN, x_t_ptr, x_t_stride_n, x_t_ROW, x_t_COLUMN,
            c_skip_t_ptr, c_out_t_ptr, clean_ptr, clean_stride_n, clean_ROW, clean_COLUMN,
            F_r_ptr, F_r_stride_n, F_r_ROW, F_r_COLUMN, x_r_ptr, x_r_stride_n, x_r_ROW, x_r_COLUMN,
            c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
        )
        squares += v * v
        if tF_ptr is not None:
            tF = load_elements(tF_ptr, n, tF_stride_n, element, mask, COLUMNS, tF_ROW, tF_COLUMN)
            products += v * (tl.load(c_out_t_ptr + n) * tF)
        if tx_ptr is not None:
            tx = load_elements(tx_ptr, n, tx_stride_n, element, mask, COLUMNS, tx_ROW, tx_COLUMN)
            products += v * (tl.load(c_skip_t_ptr + n) * tx)
    total, product = tl.sum(squares), tl.sum(products)
    if SPLITS == 1:
        store_dual(
            total, product, n, None, weight_ptr, tweight_ptr, loss_ptr, tangent_ptr, SQUARED, C, C_SQUARED
        )
    else:
        tl.store(partial_ptr + n * SPLITS + split, total)
        # The second half of the scratch begins after the parts of all images.
        tl.store(partial_ptr + (tl.num_programs(0) + n * SPLITS) + split, product)
# fmt: on


@triton.jit
def finish_kernel(
    partial_ptr,
    weight_ptr,
    tweight_ptr,
    loss_ptr,
    tangent_ptr,
    num,
    SQUARED: tl.constexpr,
    C: tl.constexpr,
    C_SQUARED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss and tangent of ROWS images from their partial sums."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num
    squares = sum_of_parts(partial_ptr, row, is_row, SPLITS, SPLIT_BLOCK)
    product = sum_of_parts(partial_ptr, num + row, is_row, SPLITS, SPLIT_BLOCK)
    store_dual(squares, product, row, is_row, weight_ptr, tweight_ptr, loss_ptr, tangent_ptr, SQUARED, C, C_SQUARED)


def jvp_launches(
    tangents: Tangents,
    student: Denoiser,
    target: Target,
    weight_N: Float[Tensor, " N"],
    distance: str,
    c: float,
    loss_N: Float[Tensor, " N"],
    tangent_N: Float[Tensor, " N"],
    arch: str,
) -> list[Launch]:
    """The launches that fill ``loss_N`` and ``tangent_N``; images evenly spaced, [N] vectors contiguous and fp32.

    Scratch: the partial sums of squares and products, fp32 [2, N, splits], of images that one program does not hold.
    """
    order = loop_format(student.F)
    arguments, elements = shared_arguments(student, target, distance, c, order)
    moved = image_arguments("tF", tangents.F_t, order) | image_arguments("tx", tangents.x_t, order)
    split, num = split_image("jvp", elements, arch), len(loss_N)
    partial_2NS = torch.empty(2, num, split.splits, device=loss_N.device) if split.splits > 1 else None
    weights = {"weight_ptr": weight_N, "tweight_ptr": tangents.weight_N}
    outputs = weights | {"loss_ptr": loss_N, "tangent_ptr": tangent_N, "partial_ptr": partial_2NS}
    main = split.launch(loss_jvp_kernel, num, arguments | moved | outputs)
    if partial_2NS is None:
        return [main]
    constants = {name: arguments[name] for name in ("SQUARED", "C", "C_SQUARED")}
    return [main, split.finish(finish_kernel, num, outputs | constants)]
