import pytest
import torch
import triton
import triton.language as tl

from fastcm.kernels.philox import PhiloxKey, random_bits
from fastcm.kernels.philox.device import interleave4, random_bits4, select_lane
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


KEYS = [(0, 0), (1, 2**32 - 1), (2**31, 0xDEADBEEF)]
INDICES = torch.tensor([0, 7, 2**32 - 1, 2**32, 2**40 + 5])


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
