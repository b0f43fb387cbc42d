import pytest
import torch
import triton
import triton.language as tl

from fastcm.kernels.philox import PhiloxKey, random_bits, random_normal
from fastcm.kernels.philox.device import (
    box_muller,
    cos_sin_turn,
    interleave4,
    log_unit,
    random_bits4,
    random_normal4,
    select_lane,
)
from fastcm.kernels.philox.reference import box_muller as box_muller_reference
from fastcm.kernels.runtime.launch import as_int32


@triton.jit
def bits_kernel(out_ptr, index_ptr, key0, key1, draw, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    lanes = random_bits4(key0, key1, draw, tl.load(index_ptr + row), block)
    bits = interleave4(*lanes)
    tl.store(out_ptr + row * 4 * BLOCKS + tl.arange(0, 4 * BLOCKS), bits.to(tl.int64))


@triton.jit
def lane_kernel(out_ptr, index_ptr, key0, key1, draw, ELEMENTS: tl.constexpr):
    element = tl.arange(0, ELEMENTS)
    lanes = random_bits4(key0, key1, draw, tl.load(index_ptr), element // 4)
    tl.store(out_ptr + element, select_lane(*lanes, element % 4).to(tl.int64))


@triton.jit
def normal_kernel(out_ptr, index_ptr, key0, key1, draw, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    lanes = random_normal4(key0, key1, draw, tl.load(index_ptr + row), tl.arange(0, BLOCKS))
    tl.store(out_ptr + row * 4 * BLOCKS + tl.arange(0, 4 * BLOCKS), interleave4(*lanes))


@triton.jit
def box_muller_kernel(out_ptr, bits_ptr, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    b0, b1 = tl.load(bits_ptr + 2 * pair).to(tl.uint32), tl.load(bits_ptr + 2 * pair + 1).to(tl.uint32)
    cosine, sine = box_muller(b0, b1)
    tl.store(out_ptr + 2 * pair, cosine)
    tl.store(out_ptr + 2 * pair + 1, sine)


@triton.jit
def log_kernel(out_ptr, u_ptr, NUM: tl.constexpr):
    place = tl.arange(0, NUM)
    tl.store(out_ptr + place, log_unit(tl.load(u_ptr + place)))


@triton.jit
def turn_kernel(cosine_ptr, sine_ptr, v_ptr, NUM: tl.constexpr):
    place = tl.arange(0, NUM)
    cosine, sine = cos_sin_turn(tl.load(v_ptr + place))
    tl.store(cosine_ptr + place, cosine)
    tl.store(sine_ptr + place, sine)


KEYS = [(0, 0), (1, 2**32 - 1), (2**31, 0xDEADBEEF)]
INDICES = torch.tensor([0, 7, 2**32 - 1, 2**32, 2**40 + 5, 2**62 + 3, 2**63 - 1, -1])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("draw", [0, 3, 2**31])
def test_integers_are_those_of_the_reference(key, draw):
    out = torch.empty(len(INDICES), 64, dtype=torch.int64)
    bits_kernel[(len(INDICES),)](out, INDICES, as_int32(key[0]), as_int32(key[1]), as_int32(draw), BLOCKS=16)
    assert torch.equal(out, random_bits(PhiloxKey(key, INDICES, draw), 64))


def test_one_lane_of_each_block_can_be_selected():
    out = torch.empty(32, dtype=torch.int64)
    lane_kernel[(1,)](out, INDICES[3:], 5, 6, 1, ELEMENTS=32)
    assert torch.equal(out, random_bits(PhiloxKey((5, 6), INDICES[3:4], 1), 32)[0])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("draw", [0, 2**31])
def test_normals_are_those_of_the_reference(key, draw):
    out = torch.empty(len(INDICES), 4096)
    normal_kernel[(len(INDICES),)](out, INDICES, as_int32(key[0]), as_int32(key[1]), as_int32(draw), BLOCKS=1024)
    assert (out - random_normal(PhiloxKey(key, INDICES, draw), 4096)).abs().max() <= 1e-6


def neighbours(*centres):
    """32-bit words around the centres, also at distances where their fp32 neighbours are."""
    steps = torch.cat([torch.arange(4), 2 ** torch.arange(2, 14), 2 ** torch.arange(2, 14) + 1])
    found = torch.tensor(centres)[:, None] + torch.cat([steps, -steps])
    return found[(found >= 0) & (found < 2**32)].unique()


def test_normals_of_extreme_words_are_those_of_the_reference():
    """u at its ends, where it rounds to 1 and where its logarithm changes the exponent; v at all multiples of 1/8."""
    u = torch.cat([torch.arange(64), neighbours(2**31, 2**32 - 1, 2**24, *(round(2**k * 0.5**0.5) for k in (32, 31, 25)))])
    v = neighbours(*(k * 2**29 for k in range(8)), 2**32 - 1)
    bits = torch.cartesian_prod(u, v)
    num = 1 << (len(bits) - 1).bit_length()
    bits = torch.cat([bits, bits[: num - len(bits)]])
    out = torch.empty(2 * num)
    box_muller_kernel[(1,)](out, bits.flatten(), PAIRS=num)
    expected = box_muller_reference(bits.reshape(1, -1))[0]
    assert len(bits) > 10**5
    assert out.isfinite().all()
    assert (out - expected).abs().max() <= 1e-6
    assert expected.abs().max() > 6.7
    assert (expected.reshape(-1, 2)[bits[:, 0] == 2**32 - 1] == 0).all()


def test_logarithm_is_good_to_one_unit_in_the_last_place():
    near_one = 1 - torch.arange(2**15).double() * 2.0**-24
    everywhere = torch.logspace(-33, 0, 2**15, base=2.0, dtype=torch.float64)
    u = torch.cat([near_one, everywhere]).float()
    out = torch.empty_like(u)
    log_kernel[(1,)](out, u, NUM=len(u))
    exact = u.double().log()
    unit = torch.maximum(torch.frexp(exact).exponent.double().sub(24).exp2(), torch.tensor(1e-45).double())
    assert ((out - exact).abs() / unit).max() <= 1
    assert out[0] == 0


def test_cosine_and_sine_are_good_to_one_unit_in_the_last_place_of_one():
    """Of the angle as fp32 rounds it; every series needs its last term for this, and the rest of the reduction."""
    v = (torch.arange(2**18).double() / 2**18 + 1e-7).float()
    cosine, sine = torch.empty_like(v), torch.empty_like(v)
    turn_kernel[(1,)](cosine, sine, v, NUM=len(v))
    angle = (v * (2 * torch.pi)).double()
    for found, exact in ((cosine, angle.cos()), (sine, angle.sin())):
        assert (found - exact).abs().max() <= 5e-8
