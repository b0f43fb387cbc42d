"""The Triton kernels of the gradient of group norm.

With dz the gradient of z = a xh + b (a = weight (1 + scale)), everything follows from two sums per sample and channel,
A = sum_p dz xh and B = sum_p dz. With M values in a group and m() the mean over a group's M values:

    dx = rstd (a dz - m(a B) - xh m(a A)),  daddend = sum_p dx,  dscale = weight A + bias B,  dshift = B,
    dweight = sum_n (1 + scale) A,  dbias = sum_n (1 + scale) B.

Each value has one writer and each sum a fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.launch import Launch, ceil_div
from ..runtime.layout import channels_last
from .call import Call, Gradients
from .device import (
    by_channel,
    by_group,
    drop,
    load_tile,
    load_vector,
    membership,
    modulation,
    philox_of,
    place,
    sigmoid,
    store_tile,
    store_vector,
    zero_outside,
)

REDUCE_SAMPLES, REDUCE_CHANNELS, REDUCE_WARPS = 64, 32, 8


@triton.jit
def read(
    x_ptr,
    dy_ptr,
    pixel,
    lane,
    valid,
    minus,
    slope,
    offset,
    first,
    philox,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    STRIDE_P: tl.constexpr,
    DY_STRIDE_P: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    MASKED: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """(x less its mean, dz) of a tile: dropout's mask once more, then the derivative of z sigmoid(z), s (1 + z (1 - s))."""
    d = load_tile(x_ptr, pixel, STRIDE_P, lane, valid, PIXELS, MASKED, AGAIN) - minus[None, :]
    dz = load_tile(dy_ptr, pixel, DY_STRIDE_P, lane, valid, PIXELS, MASKED, AGAIN)
    if THRESHOLD > 0:
        dz = drop(dz, pixel, first, philox, CHANNELS, SLAB, THRESHOLD)
    if SILU:
        z = d * slope[None, :] + offset[None, :]
        scaled, complement = sigmoid(z, KEPT_SCALE)
        dz *= scaled + z * scaled * complement
    else:
        dz *= KEPT_SCALE
    return d, dz


@triton.jit(do_not_specialize=["key0", "key1", "draw"])
def backward_kernel(
    x_ptr,
    dy_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    scale_ptr,
    shift_ptr,
    index_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    daddend_ptr,
    dscale_ptr,
    dshift_ptr,
    along_ptr,
    total_ptr,
    stride_n,
    dy_stride_n,
    addend_stride,
    scale_stride,
    shift_stride,
    key0,
    key1,
    draw,
    SILU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    STRIDE_P: tl.constexpr,
    DY_STRIDE_P: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One slab of one sample: A and B, and from them dx."""
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    MASKED: tl.constexpr = PIXELS % BLOCK_P != 0 or SLAB != BLOCK_C or CHANNELS % SLAB != 0
    sample, first = place(CHANNELS, SLAB)
    lane, pixels = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    valid, member = membership(first, CHANNELS, GROUPS, SLAB, BLOCK_C, BLOCK_G)
    philox = philox_of(key0, key1, draw, index_ptr, sample)
    x_ptr += sample * stride_n + first
    dy_ptr += sample * dy_stride_n + first

    group = sample * GROUPS + (first + lane) // PER_GROUP
    rstd = load_vector(rstd_ptr, group, valid, 0.0)
    addend = load_vector(addend_ptr, sample * addend_stride + first + lane, valid, 0.0)
    minus = load_vector(mean_ptr, group, valid, 0.0) - addend
    scale_row, shift_row = sample * scale_stride, sample * shift_stride
    a, b = modulation(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, first + lane, valid)
    slope = rstd * a
    if RESIDENT:
        d, dz = read(
            x_ptr, dy_ptr, pixels, lane, valid, minus, slope, b, first, philox, SILU, THRESHOLD, KEPT_SCALE,
            STRIDE_P, DY_STRIDE_P, PIXELS, CHANNELS, SLAB, MASKED, True
        )  # fmt: skip
        along, total = tl.sum(dz * d, axis=0) * rstd, tl.sum(dz, axis=0)
    else:
        along_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        total_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(0, PIXELS, BLOCK_P):
            d, part = read(
                x_ptr, dy_ptr, start + pixels, lane, valid, minus, slope, b, first, philox, SILU, THRESHOLD, KEPT_SCALE,
                STRIDE_P, DY_STRIDE_P, PIXELS, CHANNELS, SLAB, MASKED, True
            )  # fmt: skip
            along_PC += part * d
            total_PC += part
        along, total = tl.sum(along_PC, axis=0) * rstd, tl.sum(total_PC, axis=0)
    store_sums(
        along, total, sample, first + lane, valid, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr, along_ptr, total_ptr, CHANNELS
    )

    if dx_ptr is not None:
        k1 = by_channel(by_group(a * along, member), member) * rstd * rstd * (-1.0 / (PER_GROUP * PIXELS))
        k0 = by_channel(by_group(a * total, member), member) * rstd * (-1.0 / (PER_GROUP * PIXELS))
        dx_ptr += sample * (PIXELS * CHANNELS) + first
        if RESIDENT:
            tl.debug_barrier()  # what follows is to be read from the cache, not kept in registers
            d = load_tile(x_ptr, pixels, STRIDE_P, lane, valid, PIXELS, MASKED, False) - minus[None, :]
            dx = dz * slope[None, :] + (d * k1[None, :] + k0[None, :])
            store_tile(dx_ptr, dx, pixels, lane, valid, PIXELS, CHANNELS, MASKED)
            daddend = tl.sum(zero_outside(dx, pixels, PIXELS, BLOCK_P), axis=0)
        else:
            dx_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for start in range(0, PIXELS, BLOCK_P):
                d, part = read(
                    x_ptr, dy_ptr, start + pixels, lane, valid, minus, slope, b, first, philox, SILU, THRESHOLD, KEPT_SCALE,
                    STRIDE_P, DY_STRIDE_P, PIXELS, CHANNELS, SLAB, MASKED, False
                )  # fmt: skip
                dx = part * slope[None, :] + (d * k1[None, :] + k0[None, :])
                store_tile(dx_ptr, dx, start + pixels, lane, valid, PIXELS, CHANNELS, MASKED)
                dx_PC += zero_outside(dx, start + pixels, PIXELS, BLOCK_P)
            daddend = tl.sum(dx_PC, axis=0)
        if daddend_ptr is not None:
            store_vector(daddend_ptr, daddend, sample * CHANNELS + first + lane, valid)


@triton.jit
def store_sums(
    along,
    total,
    sample,
    channel,
    valid,
    weight_ptr,
    bias_ptr,
    dscale_ptr,
    dshift_ptr,
    along_ptr,
    total_ptr,
    CHANNELS: tl.constexpr,
):
    """A and B where the reduction over samples needs them, and the gradients that they are."""
    place_C = sample * CHANNELS + channel
    if along_ptr is not None:
        store_vector(along_ptr, along, place_C, valid)
        store_vector(total_ptr, total, place_C, valid)
    if dscale_ptr is not None:
        dscale = load_vector(weight_ptr, channel, valid, 1.0) * along + load_vector(bias_ptr, channel, valid, 0.0) * total
        store_vector(dscale_ptr, dscale, place_C, valid)
    if dshift_ptr is not None:
        store_vector(dshift_ptr, total, place_C, valid)


@triton.jit(do_not_specialize=["num_samples"])
def reduce_kernel(
    along_ptr,
    total_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    num_samples,
    scale_stride,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight = sum_n (1 + scale) A and dbias = sum_n (1 + scale) B for a block of channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, num_samples, BLOCK_N):
        sample = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (sample < num_samples)[:, None] & (channel < CHANNELS)[None, :]
        place_NC = (sample * CHANNELS)[:, None] + channel[None, :]
        along = tl.load(along_ptr + place_NC, mask=mask, other=0.0)
        total = tl.load(total_ptr + place_NC, mask=mask, other=0.0)
        if scale_ptr is not None:
            gain = 1.0 + tl.load(scale_ptr + (sample * scale_stride)[:, None] + channel[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            along, total = along * gain, total * gain
        dweight += along
        dbias += total
    store_vector(dweight_ptr, tl.sum(dweight, axis=0), channel, channel < CHANNELS)
    store_vector(dbias_ptr, tl.sum(dbias, axis=0), channel, channel < CHANNELS)


def backward_launches(
    call: Call,
    dy_NCHW: Float[Tensor, "N C H W"],
    mean_NG: Float[Tensor, "N G"],
    rstd_NG: Float[Tensor, "N G"],
    gradients: Gradients,
    arch: str,
) -> list[Launch]:
    """One launch for all that belongs to a sample; a second one sums over samples where weight or bias want a gradient.

    The sums per sample and channel that lie between the two are the only scratch memory.
    """
    n, channels = call.x_NCHW.shape[:2]
    tile = call.tiling("backward", arch)
    dy_NCHW, layout = channels_last(dy_NCHW)
    sums = dict.fromkeys(("along_ptr", "total_ptr"))
    if gradients.dweight_C is not None:
        sums = {name: torch.empty(n, channels, dtype=torch.float32, device=dy_NCHW.device) for name in sums}
    shared = call.kernel_arguments(tile)
    images = {"dy_ptr": dy_NCHW, "dy_stride_n": layout.stride_n, "DY_STRIDE_P": layout.stride_p, "dx_ptr": gradients.dx_NCHW}
    rows = {"daddend_ptr": gradients.daddend_NC, "dscale_ptr": gradients.dscale_NC, "dshift_ptr": gradients.dshift_NC}
    arguments = shared | images | rows | sums | {"mean_ptr": mean_NG, "rstd_ptr": rstd_NG}
    launches = [tile.launch(backward_kernel, n, arguments)]
    if gradients.dweight_C is not None:
        scale = {name: shared[name] for name in ("scale_ptr", "scale_stride")}
        sizes = {"num_samples": n, "CHANNELS": channels, "BLOCK_N": REDUCE_SAMPLES, "BLOCK_C": REDUCE_CHANNELS}
        outputs = {"dweight_ptr": gradients.dweight_C, "dbias_ptr": gradients.dbias_C}
        grid = (ceil_div(channels, REDUCE_CHANNELS),)
        launches.append(Launch(reduce_kernel, grid, sums | scale | sizes | outputs, REDUCE_WARPS))
    return launches
