"""Philox4x32-10 inside Triton kernels: the same integers as ``reference.py``, bit for bit.

Words are uint32. Shapes are those of the counter word ``block``.
"""

import triton
import triton.language as tl

from .reference import KEY_INCREMENTS, NUM_ROUNDS, ROUND_MULTIPLIERS

M0, M1 = (tl.constexpr(value) for value in ROUND_MULTIPLIERS)
W0, W1 = (tl.constexpr(value) for value in KEY_INCREMENTS)
ROUNDS = tl.constexpr(NUM_ROUNDS)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four counter words and two key words, all uint32; SC 2011, section 3.3."""
    for _ in tl.static_range(ROUNDS):
        m0 = tl.full((), M0, tl.uint32)
        m1 = tl.full((), M1, tl.uint32)
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), W0, tl.uint32)
        k1 += tl.full((), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random_bits4(key0, key1, draw, index, block):
    """The four lanes of each Philox block of one sample: elements 4 block + 0..3.

    key0, key1, draw: int32 with the bits of the words; index: int64 global sample index (scalar or like block);
    block: element // 4, any integer type.
    """
    zero = block.to(tl.uint32) * 0
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    k0, k1 = key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)
    return philox4x32(zero + block.to(tl.uint32), zero + draw.to(tl.uint32, bitcast=True), zero + low, zero + high, k0, k1)


@triton.jit
def select_lane(b0, b1, b2, b3, lane):
    """Lane 0..3 of a block, element by element."""
    return tl.where(lane < 2, tl.where(lane == 0, b0, b1), tl.where(lane == 2, b2, b3))


@triton.jit
def interleave4(b0, b1, b2, b3):
    """[..., B] four times to [..., 4 B]: element 4 b + lane comes from lane ``lane`` of block b."""
    return tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
