"""What the Triton kernels of group norm share. Tiles are [pixels, channels] of one slab, vectors [channels] or [groups]."""

import triton
import triton.language as tl

from ..philox.device import interleave4, random_bits4, select_lane

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(z, SCALE: tl.constexpr):
    """SCALE / (1 + exp(-z)), and 1 less that without SCALE.

    The reciprocal is a squared reciprocal root, two instructions where a division takes nine; dropout's scale costs none.
    """
    root = tl.rsqrt(tl.exp2(z * -LOG2_E) * (1.0 / SCALE) + 1.0 / SCALE)
    scaled = root * root
    return scaled, 1.0 - scaled * (1.0 / SCALE)


@triton.jit
def place(CHANNELS: tl.constexpr, SLAB: tl.constexpr):
    """(sample, first channel) of this program; slabs of one sample are neighbours."""
    num_slabs: tl.constexpr = (CHANNELS + SLAB - 1) // SLAB
    program = tl.program_id(0)
    return (program // num_slabs).to(tl.int64), (program % num_slabs) * SLAB


@triton.jit
def membership(
    first, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr
):
    """(whether each lane holds a channel [C], which lane belongs to which group of the slab [G, C])."""
    lane = tl.arange(0, BLOCK_C)
    valid = (lane < SLAB) & (first + lane < CHANNELS)
    member = (lane // (CHANNELS // GROUPS))[None, :] == tl.arange(0, BLOCK_G)[:, None]
    return valid, member & valid[None, :]


@triton.jit
def by_group(value_C, member_GC):
    """The sum over the channels of each group, for any number of channels per group."""
    return tl.sum(tl.where(member_GC, value_C[None, :], 0.0), axis=1)


@triton.jit
def by_channel(value_G, member_GC):
    """The value of the group of each channel; 0 for lanes without a channel."""
    return tl.sum(tl.where(member_GC, value_G[:, None], 0.0), axis=0)


@triton.jit
def load_vector(ptr, offset, valid_C, DEFAULT: tl.constexpr):
    """fp32 values of the channels of this slab, or DEFAULT where there is no such argument."""
    if ptr is None:
        value = tl.zeros(valid_C.shape, tl.float32) + DEFAULT
    else:
        value = tl.load(ptr + offset, mask=valid_C, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_vector(ptr, value, offset, valid_C):
    """Round a vector to the dtype of its tensor and write it."""
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=valid_C)


@triton.jit
def load_tile(ptr, pixel, stride, lane, valid_C, PIXELS: tl.constexpr, MASKED: tl.constexpr, AGAIN: tl.constexpr):
    """A tile in fp32, 0 where there is no pixel or channel; without masks where the tiles cover the image exactly.

    AGAIN: the cache should keep the tile, since the same program reads it once more.
    """
    offset = (pixel * stride)[:, None] + lane[None, :]
    policy: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    if MASKED:
        value = tl.load(ptr + offset, mask=(pixel < PIXELS)[:, None] & valid_C[None, :], other=0.0, eviction_policy=policy)
    else:
        value = tl.load(ptr + offset, eviction_policy=policy)
    return value.to(tl.float32)


@triton.jit
def store_tile(ptr, value, pixel, lane, valid_C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """Round a tile to the dtype of a dense image and write it."""
    offset = (pixel * CHANNELS)[:, None] + lane[None, :]
    value = value.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offset, value, mask=(pixel < PIXELS)[:, None] & valid_C[None, :])
    else:
        tl.store(ptr + offset, value)


@triton.jit
def zero_outside(value, pixel, PIXELS: tl.constexpr, BLOCK_P: tl.constexpr):
    """0 for pixels past the image, so that sums do not see them."""
    if PIXELS % BLOCK_P != 0:
        value = tl.where((pixel < PIXELS)[:, None], value, 0.0)
    return value


@triton.jit
def drop(value, pixel, first, philox, CHANNELS: tl.constexpr, SLAB: tl.constexpr, THRESHOLD: tl.constexpr):
    """0 where dropout's mask of the tile says so: element e = pixel C + channel is kept where its bits >= THRESHOLD.

    philox: (key0, key1, draw, sample index).
    """
    BLOCK_C: tl.constexpr = value.shape[1]
    key0, key1, draw, index = philox
    start = pixel * CHANNELS + first
    if CHANNELS % 4 == 0 and SLAB % 4 == 0 and BLOCK_C >= 4:
        # Four neighbouring channels are the four lanes of one Philox block.
        block = (start // 4)[:, None] + tl.arange(0, BLOCK_C // 4)[None, :]
        b0, b1, b2, b3 = random_bits4(key0, key1, draw, index, block)
        bits = interleave4(b0, b1, b2, b3)
    else:
        element = start[:, None] + tl.arange(0, BLOCK_C)[None, :]
        b0, b1, b2, b3 = random_bits4(key0, key1, draw, index, element // 4)
        bits = select_lane(b0, b1, b2, b3, element % 4)
    return tl.where(bits >= tl.full((), THRESHOLD, tl.uint32), value, 0.0)


@triton.jit
def philox_of(key0, key1, draw, index_ptr, sample):
    """The words that ``drop`` takes; index_ptr is None without dropout."""
    index = sample
    if index_ptr is not None:
        index = tl.load(index_ptr + sample)
    return key0, key1, draw, index


@triton.jit
def modulation(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row, channel, valid_C):
    """(a, b) of z = a xh + b: a = weight (1 + scale), b = bias (1 + scale) + shift."""
    gain = 1.0 + load_vector(scale_ptr, scale_row + channel, valid_C, 0.0)
    a = load_vector(weight_ptr, channel, valid_C, 1.0) * gain
    b = load_vector(bias_ptr, channel, valid_C, 0.0) * gain + load_vector(shift_ptr, shift_row + channel, valid_C, 0.0)
    return a, b


@triton.jit
def pivot(x, addend, member_GC, PIXELS: tl.constexpr, PER_GROUP: tl.constexpr):
    """(centre per group, what to take from x per channel): the mean of a tile of x + addend, and that less the addend.

    However large the mean is, the variance from sums of x less this pivot loses at most a factor (pixels of the image) / (of
    the tile) in precision: the square of the pivot's error times the tile's share of the image is a part of the variance.
    """
    centre = by_group(tl.sum(x, axis=0) / PIXELS + addend, member_GC) / PER_GROUP
    return centre, by_channel(centre, member_GC) - addend


@triton.jit
def statistics(sum_C, square_C, member_GC, COUNT: tl.constexpr, EPS: tl.constexpr):
    """(mean, 1 / standard deviation) per group from the sums of COUNT values less a pivot and of their squares."""
    mean = by_group(sum_C, member_GC) / COUNT
    variance = by_group(square_C, member_GC) / COUNT - mean * mean
    return mean, tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + EPS)  # rounding can make it negative


@triton.jit
def store_statistics(
    mean_ptr,
    rstd_ptr,
    mean,
    rstd,
    sample,
    first,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mean and 1 / standard deviation of the groups of this slab."""
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    in_slab = tl.arange(0, BLOCK_G)
    group = first // PER_GROUP + in_slab
    known = (in_slab < SLAB // PER_GROUP) & (group < GROUPS)
    tl.store(mean_ptr + sample * GROUPS + group, mean, mask=known)
    tl.store(rstd_ptr + sample * GROUPS + group, rstd, mask=known)
