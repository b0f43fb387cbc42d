"""The Triton kernel of group norm: y = dropout(silu(norm(x + addend) (1 + scale) + shift)).

A slab that fits into registers is read once; a larger one is read once from memory and once more from the cache.
"""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.launch import Launch
from .call import Call
from .device import (
    by_channel,
    drop,
    load_tile,
    load_vector,
    membership,
    modulation,
    philox_of,
    pivot,
    place,
    sigmoid,
    statistics,
    store_statistics,
    store_tile,
    zero_outside,
)


@triton.jit
def finish(
    d,
    slope,
    offset,
    pixel,
    first,
    philox,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """y of a tile of x less its pivot."""
    y = d * slope[None, :] + offset[None, :]
    if SILU:
        y *= sigmoid(y, KEPT_SCALE)[0]
    else:
        y *= KEPT_SCALE
    if THRESHOLD > 0:
        y = drop(y, pixel, first, philox, CHANNELS, SLAB, THRESHOLD)
    return y


@triton.jit(do_not_specialize=["key0", "key1", "draw"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    scale_ptr,
    shift_ptr,
    index_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_n,
    addend_stride,
    scale_stride,
    shift_stride,
    key0,
    key1,
    draw,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    STRIDE_P: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One slab of one sample."""
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    MASKED: tl.constexpr = PIXELS % BLOCK_P != 0 or SLAB != BLOCK_C or CHANNELS % SLAB != 0
    sample, first = place(CHANNELS, SLAB)
    lane, pixels = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    valid, member = membership(first, CHANNELS, GROUPS, SLAB, BLOCK_C, BLOCK_G)
    philox = philox_of(key0, key1, draw, index_ptr, sample)
    x_ptr += sample * stride_n + first
    y_ptr += sample * (PIXELS * CHANNELS) + first
    addend = load_vector(addend_ptr, sample * addend_stride + first + lane, valid, 0.0)

    x = load_tile(x_ptr, pixels, STRIDE_P, lane, valid, PIXELS, MASKED, not RESIDENT)
    centre, minus = pivot(x, addend, member, PIXELS if RESIDENT else BLOCK_P, PER_GROUP)
    if RESIDENT:
        d = zero_outside(x - minus[None, :], pixels, PIXELS, BLOCK_P)
        sums, squares = tl.sum(d, axis=0), tl.sum(d * d, axis=0)
    else:
        sum_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        square_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(0, PIXELS, BLOCK_P):
            x = load_tile(x_ptr, start + pixels, STRIDE_P, lane, valid, PIXELS, MASKED, True)
            part = zero_outside(x - minus[None, :], start + pixels, PIXELS, BLOCK_P)
            sum_PC += part
            square_PC += part * part
        sums, squares = tl.sum(sum_PC, axis=0), tl.sum(square_PC, axis=0)
    rest, rstd = statistics(sums, squares, member, PER_GROUP * PIXELS, EPS)
    store_statistics(mean_ptr, rstd_ptr, centre + rest, rstd, sample, first, CHANNELS, GROUPS, SLAB, BLOCK_G)

    scale_row, shift_row = sample * scale_stride, sample * shift_stride
    a, b = modulation(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, first + lane, valid)
    slope = by_channel(rstd, member) * a
    offset = b - by_channel(rest, member) * slope
    if RESIDENT:
        y = finish(d, slope, offset, pixels, first, philox, SILU, THRESHOLD, KEPT_SCALE, CHANNELS, SLAB)
        store_tile(y_ptr, y, pixels, lane, valid, PIXELS, CHANNELS, MASKED)
    else:
        for start in range(0, PIXELS, BLOCK_P):
            pixel = start + pixels
            d = load_tile(x_ptr, pixel, STRIDE_P, lane, valid, PIXELS, MASKED, False) - minus[None, :]
            y = finish(d, slope, offset, pixel, first, philox, SILU, THRESHOLD, KEPT_SCALE, CHANNELS, SLAB)
            store_tile(y_ptr, y, pixel, lane, valid, PIXELS, CHANNELS, MASKED)


def forward_launches(
    call: Call, y_NCHW: Float[Tensor, "N C H W"], mean_NG: Float[Tensor, "N G"], rstd_NG: Float[Tensor, "N G"], arch: str
) -> list[Launch]:
    """The one launch that writes y (dense channels_last) and mean and 1 / standard deviation of every group (fp32)."""
    tile = call.tiling("forward", arch)
    arguments = call.kernel_arguments(tile) | {"y_ptr": y_NCHW, "mean_ptr": mean_NG, "rstd_ptr": rstd_NG, "EPS": call.eps}
    return [tile.launch(forward_kernel, len(y_NCHW), arguments)]
