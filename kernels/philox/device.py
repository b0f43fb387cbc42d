"""Philox4x32-10 inside Triton kernels: the integers of ``reference.py`` bit for bit, its normals to 1e-6.

Words are uint32. Shapes are those of the counter word ``block``. Logarithm, sine and cosine are written out here: Triton's
become the GPU's approximate instructions, whose logarithm has no digit left near 1 (lg2.approx is good to 2^-22 absolutely).
"""

import math

import triton
import triton.language as tl

from .reference import KEY_INCREMENTS, NUM_ROUNDS, ROUND_MULTIPLIERS

M0, M1 = (tl.constexpr(value) for value in ROUND_MULTIPLIERS)
W0, W1 = (tl.constexpr(value) for value in KEY_INCREMENTS)
ROUNDS = tl.constexpr(NUM_ROUNDS)

WORD = tl.constexpr(2.0**-32)
TWO_PI = tl.constexpr(2.0 * math.pi)
# Tops of constants with so few bits that small integers times them are exact in fp32, and the rests.
HALF_PI_HIGH = tl.constexpr(1.5703125)
HALF_PI_LOW = tl.constexpr(math.pi / 2 - 1.5703125)
LN2_HIGH = tl.constexpr(0.693138122558594)
LN2_LOW = tl.constexpr(math.log(2.0) - 0.693138122558594)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
MANTISSA_BITS = tl.constexpr(23)


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
    return philox4x32(zero + block.to(tl.uint32), zero + _word(draw), zero + low, zero + high, _word(key0), _word(key1))


@triton.jit
def _word(value):
    """The bits of an int32 as uint32, also where the launcher has made the value 1 a constant."""
    return tl.cast(value, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def select_lane(b0, b1, b2, b3, lane):
    """Lane 0..3 of a block, element by element."""
    return tl.where(lane < 2, tl.where(lane == 0, b0, b1), tl.where(lane == 2, b2, b3))


@triton.jit
def interleave4(b0, b1, b2, b3):
    """[..., B] four times to [..., 4 B]: element 4 b + lane comes from lane ``lane`` of block b."""
    return tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))


@triton.jit
def random_normal4(key0, key1, draw, index, block):
    """The four standard normals of each Philox block of one sample: elements 4 block + 0..3 of ``random_normal``.

    n_0, n_1 = r cos(2 pi v), r sin(2 pi v) with r = sqrt(-2 ln u), u = (b_0 + 1/2) / 2^32, v = b_1 / 2^32; n_2, n_3 from
    b_2, b_3. fp32, within 1e-6 of ``reference.py`` for all bits. Arguments are those of ``random_bits4``.
    """
    b0, b1, b2, b3 = random_bits4(key0, key1, draw, index, block)
    n0, n1 = box_muller(b0, b1)
    n2, n3 = box_muller(b2, b3)
    return n0, n1, n2, n3


@triton.jit
def box_muller(b0, b1):
    """Two independent standard normals, fp32, from two random words."""
    radius = tl.sqrt_rn(-2.0 * log_unit((b0.to(tl.float32) + 0.5) * WORD))
    cosine, sine = cos_sin_turn(b1.to(tl.float32) * WORD)
    return radius * cosine, radius * sine


@triton.jit
def log_unit(u):
    """ln u for normal fp32 numbers u in (0, 1], below 1 ulp, also relatively near 1, where ln u is u - 1 exactly taken.

    u = 2^k m, sqrt(1/2) <= m < sqrt(2), f = m - 1, s = f / (2 + f): ln(1 + f) = f - f^2/2 + s (f^2/2 + R),
    R = 2 s^2 (1/3 + s^2/5 + s^4/7 + s^6/9), from the series of 2 artanh(s).
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    f = (bits - (exponent << MANTISSA_BITS)).to(tl.float32, bitcast=True) - 1.0
    k = exponent.to(tl.float32)
    s = f / (2.0 + f)
    z = s * s
    R = z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9))))
    half_square = 0.5 * f * f
    return k * LN2_HIGH - ((half_square - (s * (half_square + R) + k * LN2_LOW)) - f)


@triton.jit
def cos_sin_turn(v):
    """cos and sin of the fp32 number fl(2 pi v), v in [0, 1], to 1 ulp of 1.

    angle = q pi/2 + r with |r| <= pi/4 up to rounding; r is kept in two parts and both series are Taylor's.
    """
    # The reference rounds the angle, by up to 2.4e-7; a fused multiply-add with what follows would not. Adding 0 in an
    # explicit one leaves the compiler no product to fuse.
    angle = tl.fma(v, tl.full(v.shape, TWO_PI, tl.float32), tl.zeros_like(v))
    quarter = (4.0 * v + 0.5).to(tl.int32)
    q = quarter.to(tl.float32)
    top = angle - q * HALF_PI_HIGH
    r = top - q * HALF_PI_LOW
    rest = (top - r) - q * HALF_PI_LOW
    z = r * r
    sine = r + (r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880)))) + rest * (1.0 - 0.5 * z))
    half = 0.5 * z
    near = 1.0 - half
    tail = z * z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))) - r * rest
    cosine = near + (((1.0 - near) - half) + tail)
    swap = (quarter & 1) == 1
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where(((quarter + 1) & 2) == 2, -cosine, cosine), tl.where((quarter & 2) == 2, -sine, sine)
