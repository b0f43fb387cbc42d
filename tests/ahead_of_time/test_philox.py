"""The random numbers compiled for GPUs that are not there: what they cost, and which instructions they must not become."""

import re

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time.compiler import check_resources, check_table, compile_launch, specialisation
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcm.kernels.philox.device import cos_sin_turn, interleave4, random_bits4, random_normal4
from fastcm.kernels.runtime.launch import Launch

BLOCKS = 256


@triton.jit
def bits_kernel(out_ptr, index_ptr, key0, key1, draw, BLOCKS: tl.constexpr):
    lanes = random_bits4(key0, key1, draw, tl.load(index_ptr), tl.arange(0, BLOCKS))
    tl.store(out_ptr + tl.arange(0, 4 * BLOCKS), interleave4(*lanes).to(tl.int32, bitcast=True))


@triton.jit
def normal_kernel(out_ptr, index_ptr, key0, key1, draw, BLOCKS: tl.constexpr):
    lanes = random_normal4(key0, key1, draw, tl.load(index_ptr), tl.arange(0, BLOCKS))
    tl.store(out_ptr + tl.arange(0, 4 * BLOCKS), interleave4(*lanes))


@triton.jit
def turn_kernel(v_ptr, out_ptr, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    cosine, sine = cos_sin_turn(tl.load(v_ptr + block))
    tl.store(out_ptr + block, cosine + sine)


def launch(kernel, dtype=torch.float32, words=(3, -5, 0)):
    out = torch.empty(4 * BLOCKS, dtype=dtype, device="meta")
    if kernel is turn_kernel:
        return Launch(kernel, (1,), {"v_ptr": out, "out_ptr": out, "BLOCKS": BLOCKS})
    index = torch.empty(1, dtype=torch.int64, device="meta")
    words = dict(zip(("key0", "key1", "draw"), words, strict=True))
    return Launch(kernel, (1,), {"out_ptr": out, "index_ptr": index, **words, "BLOCKS": BLOCKS})


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_resources(capability):
    rows = {}
    for name, kernel, dtype in (("bits", bits_kernel, torch.int32), ("normals", normal_kernel, torch.float32)):
        rows[name] = compile_launch(launch(kernel, dtype), capability)
        check_resources(rows[name], capability, matrix=False, wide=False)
        assert rows[name].shared_bytes == 0, "lanes of one block belong to one thread: no exchange between threads"
    check_table(f"philox_sm{capability}", rows)


def test_words_of_one_are_words_too():
    compile_launch(launch(bits_kernel, torch.int32, words=(1, 1, 1)), 90)


def instructions(kernel) -> list[str]:
    """PTX of a kernel for sm_90, its operations with their operands."""
    signature, constants, attributes = specialisation(launch(kernel))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    return [line.strip() for line in text.splitlines() if re.match(r"\s+[a-z][\w.]+\s", line)]


def test_normals_use_no_approximate_function():
    found = instructions(normal_kernel)
    assert not [line for line in found if re.match(r"(lg2|ex2|sin|cos|sqrt|rsqrt|rcp|tanh)\.approx", line)]
    assert any(re.match(r"sqrt\.rn\.(ftz\.)?f32", line) for line in found)


def test_the_angle_is_rounded_before_anything_is_subtracted():
    """The reference rounds 2 pi v; a product that melts into the next subtraction would not be rounded."""
    two_pi = "0f40C90FDB"
    uses = [line for line in instructions(turn_kernel) if two_pi in line]
    assert uses
    assert all(re.search(r"fma\.rn\.f32.*, 0f00000000;", line) for line in uses), uses
