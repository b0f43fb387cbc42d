"""The Triton kernel that takes a tangent along: (x, tx) to (y, ty) of group norm.

txh = rstd (tx' - m(tx') - xh m(xh tx')), tz = a txh + ta xh + tb, ty = dropout(silu'(z) tz), with tx' = tx + taddend, m the
mean over a group, a = weight (1 + scale), ta = weight tscale, tb = bias tscale + tshift. The same Jacobian as backward's.
"""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.launch import Launch
from ..runtime.layout import channels_last
from .call import Call, Tangents, row_arguments
from .device import (
    by_channel,
    by_group,
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
    store_tile,
    zero_outside,
)


@triton.jit
def finish(
    d,
    t,
    slope,
    offset,
    along_d,
    constant,
    pixel,
    first,
    philox,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """(y, ty) of a tile of x less its pivot and of tx; the factor of tx is the factor of x."""
    y = d * slope[None, :] + offset[None, :]
    ty = t * slope[None, :] + (d * along_d[None, :] + constant[None, :])
    if SILU:
        scaled, complement = sigmoid(y, KEPT_SCALE)
        y *= scaled
        ty *= scaled + y * complement
    else:
        y, ty = y * KEPT_SCALE, ty * KEPT_SCALE
    if THRESHOLD > 0:
        y = drop(y, pixel, first, philox, CHANNELS, SLAB, THRESHOLD)
        ty = drop(ty, pixel, first, philox, CHANNELS, SLAB, THRESHOLD)
    return y, ty


@triton.jit
def moments(
    x_ptr,
    tx_ptr,
    lane,
    valid,
    minus,
    STRIDE_P: tl.constexpr,
    TX_STRIDE_P: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sums over pixels of d, d^2, tx and d tx, with d = x less its pivot, tile by tile."""
    pixels = tl.arange(0, BLOCK_P)
    sum_PC = tl.zeros([BLOCK_P, lane.shape[0]], tl.float32)
    square_PC = tl.zeros([BLOCK_P, lane.shape[0]], tl.float32)
    tangent_PC = tl.zeros([BLOCK_P, lane.shape[0]], tl.float32)
    product_PC = tl.zeros([BLOCK_P, lane.shape[0]], tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        x = load_tile(x_ptr, start + pixels, STRIDE_P, lane, valid, PIXELS, MASKED, True)
        t = load_tile(tx_ptr, start + pixels, TX_STRIDE_P, lane, valid, PIXELS, MASKED, True)
        d = zero_outside(x - minus[None, :], start + pixels, PIXELS, BLOCK_P)
        sum_PC += d
        square_PC += d * d
        tangent_PC += t
        product_PC += d * t
    return tl.sum(sum_PC, axis=0), tl.sum(square_PC, axis=0), tl.sum(tangent_PC, axis=0), tl.sum(product_PC, axis=0)


@triton.jit
def modulation_tangent(weight_ptr, bias_ptr, tscale_ptr, tshift_ptr, tscale_row, tshift_row, channel, valid_C):
    """(ta, tb): ta = weight tscale, tb = bias tscale + tshift."""
    tscale = load_vector(tscale_ptr, tscale_row + channel, valid_C, 0.0)
    tshift = load_vector(tshift_ptr, tshift_row + channel, valid_C, 0.0)
    ta = load_vector(weight_ptr, channel, valid_C, 1.0) * tscale
    return ta, load_vector(bias_ptr, channel, valid_C, 0.0) * tscale + tshift


@triton.jit(do_not_specialize=["key0", "key1", "draw"])
def jvp_kernel(
    x_ptr,
    tx_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    scale_ptr,
    shift_ptr,
    taddend_ptr,
    tscale_ptr,
    tshift_ptr,
    index_ptr,
    y_ptr,
    ty_ptr,
    stride_n,
    tx_stride_n,
    addend_stride,
    scale_stride,
    shift_stride,
    taddend_stride,
    tscale_stride,
    tshift_stride,
    key0,
    key1,
    draw,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    STRIDE_P: tl.constexpr,
    TX_STRIDE_P: tl.constexpr,
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
    COUNT: tl.constexpr = PER_GROUP * PIXELS
    MASKED: tl.constexpr = PIXELS % BLOCK_P != 0 or SLAB != BLOCK_C or CHANNELS % SLAB != 0
    sample, first = place(CHANNELS, SLAB)
    lane, pixels = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    valid, member = membership(first, CHANNELS, GROUPS, SLAB, BLOCK_C, BLOCK_G)
    x_ptr += sample * stride_n + first
    tx_ptr += sample * tx_stride_n + first
    y_ptr += sample * (PIXELS * CHANNELS) + first
    ty_ptr += sample * (PIXELS * CHANNELS) + first
    philox = philox_of(key0, key1, draw, index_ptr, sample)
    addend = load_vector(addend_ptr, sample * addend_stride + first + lane, valid, 0.0)

    x = load_tile(x_ptr, pixels, STRIDE_P, lane, valid, PIXELS, MASKED, not RESIDENT)
    _, minus = pivot(x, addend, member, PIXELS if RESIDENT else BLOCK_P, PER_GROUP)
    if RESIDENT:
        t = load_tile(tx_ptr, pixels, TX_STRIDE_P, lane, valid, PIXELS, MASKED, False)
        d = zero_outside(x - minus[None, :], pixels, PIXELS, BLOCK_P)
        sums, squares, tangents, products = tl.sum(d, axis=0), tl.sum(d * d, axis=0), tl.sum(t, axis=0), tl.sum(d * t, axis=0)
    else:
        sums, squares, tangents, products = moments(
            x_ptr, tx_ptr, lane, valid, minus, STRIDE_P, TX_STRIDE_P, PIXELS, BLOCK_P, MASKED
        )
    rest, rstd = statistics(sums, squares, member, COUNT, EPS)
    taddend = load_vector(taddend_ptr, sample * taddend_stride + first + lane, valid, 0.0)
    tmean = by_group(tangents + PIXELS * taddend, member) / COUNT
    # m(xh tx') = rstd (m(d tx') - m(d) m(tx')), since xh = rstd (d - m(d)).
    along = rstd * (by_group(products + taddend * sums, member) / COUNT - rest * tmean)

    scale_row, shift_row = sample * scale_stride, sample * shift_stride
    a, b = modulation(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, first + lane, valid)
    tscale_row, tshift_row = sample * tscale_stride, sample * tshift_stride
    ta, tb = modulation_tangent(weight_ptr, bias_ptr, tscale_ptr, tshift_ptr, tscale_row, tshift_row, first + lane, valid)
    rstd_C, rest_C = by_channel(rstd, member), by_channel(rest, member)
    slope = rstd_C * a
    offset = b - rest_C * slope
    along_d = rstd_C * (ta - slope * by_channel(along, member))
    constant = slope * (taddend - by_channel(tmean, member)) + tb - rest_C * along_d
    if RESIDENT:
        y, ty = finish(
            d, t, slope, offset, along_d, constant, pixels, first, philox, SILU, THRESHOLD, KEPT_SCALE, CHANNELS, SLAB
        )
        store_tile(y_ptr, y, pixels, lane, valid, PIXELS, CHANNELS, MASKED)
        store_tile(ty_ptr, ty, pixels, lane, valid, PIXELS, CHANNELS, MASKED)
    else:
        for start in range(0, PIXELS, BLOCK_P):
            pixel = start + pixels
            d = load_tile(x_ptr, pixel, STRIDE_P, lane, valid, PIXELS, MASKED, False) - minus[None, :]
            t = load_tile(tx_ptr, pixel, TX_STRIDE_P, lane, valid, PIXELS, MASKED, False)
            y, ty = finish(
                d, t, slope, offset, along_d, constant, pixel, first, philox, SILU, THRESHOLD, KEPT_SCALE, CHANNELS, SLAB
            )
            store_tile(y_ptr, y, pixel, lane, valid, PIXELS, CHANNELS, MASKED)
            store_tile(ty_ptr, ty, pixel, lane, valid, PIXELS, CHANNELS, MASKED)


def jvp_launches(
    call: Call, tangents: Tangents, y_NCHW: Float[Tensor, "N C H W"], ty_NCHW: Float[Tensor, "N C H W"], arch: str
) -> list[Launch]:
    """The one launch that writes y and ty (dense channels_last)."""
    tile = call.tiling("jvp", arch)
    tx_NCHW, layout = channels_last(tangents.tx_NCHW)
    images = {
        "tx_ptr": tx_NCHW,
        "tx_stride_n": layout.stride_n,
        "TX_STRIDE_P": layout.stride_p,
        "y_ptr": y_NCHW,
        "ty_ptr": ty_NCHW,
    }
    rows = row_arguments(taddend=tangents.taddend_NC, tscale=tangents.tscale_NC, tshift=tangents.tshift_NC)
    arguments = call.kernel_arguments(tile) | images | rows | {"EPS": call.eps}
    return [tile.launch(jvp_kernel, len(y_NCHW), arguments)]
