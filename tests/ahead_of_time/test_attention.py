"""The attention kernels compiled for GPUs that are not there: at every DDPM++ and ADM-64 shape, and at long sequences."""

import math

import pytest
import torch
from ahead_of_time.compiler import REGISTERS, SHARED_LIMIT, check_resources, check_table, compile_launch, specialisation

from fastcm.bench.shapes import SHAPE_SETS, AttentionShape, kernel_calls
from fastcm.kernels.attention.backward import backward_launches
from fastcm.kernels.attention.forward import forward_launches
from fastcm.kernels.attention.jvp import jvp_launches
from fastcm.kernels.runtime.layout import channels_last
from fastcm.kernels.runtime.pinned import ARCHITECTURES

CAPABILITIES = (80, 90, 100)
NUM = 128
LONG = (AttentionShape(4096, 6, 64), AttentionShape(4096, 1, 256))
ODD = (AttentionShape(250, 2, 40), AttentionShape(250, 2, 80), AttentionShape(300, 3, 24), AttentionShape(1000, 1, 128))

SINGLE = (AttentionShape(256, 9, 64), AttentionShape(64, 1, 256), AttentionShape(1024, 6, 64))


def network_shapes():
    calls = {shape for name in SHAPE_SETS for shape in kernel_calls(name) if isinstance(shape, AttentionShape)}
    return sorted(calls)


def launches(shape, arch, dtype=torch.bfloat16, num=NUM, sliced=False):
    """The launches of all passes by name, on the meta device."""
    height = next(side for side in range(math.isqrt(shape.tokens), 0, -1) if shape.tokens % side == 0)
    channels = shape.num_heads * shape.head_dim

    def image(width):
        size = (num, width, height, shape.tokens // height)
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    qkv, out, lse = image(3 * channels), image(channels), torch.empty(num, shape.num_heads, shape.tokens, device="meta")
    dout = image(2 * channels)[:, :channels] if sliced else image(channels)
    forward = forward_launches(*channels_last(qkv), shape.num_heads, out, lse, arch)
    images = (*channels_last(dout), *channels_last(qkv), *channels_last(out))
    backward = backward_launches(*images, lse, shape.num_heads, image(3 * channels), arch)
    images = (*channels_last(qkv), *channels_last(image(3 * channels)))
    jvp = jvp_launches(*images, shape.num_heads, image(channels), image(channels), arch)
    named = {"forward": forward[0], "jvp": jvp[0]}
    return named | dict(zip(("backward_queries", "backward_keys") if backward[1:] else ("backward",), backward, strict=True))


def label(shape, dtype):
    return f"T{shape.tokens} h{shape.num_heads} d{shape.head_dim} {str(dtype).removeprefix('torch.')}"


def compiled(shapes, capability, dtype):
    """Resources of every launch by name; launches that are specialised alike are compiled once."""
    known = {}
    for shape in shapes:
        for name, launch in launches(shape, f"sm{capability}", dtype).items():
            key = (launch.kernel, str(specialisation(launch)), str(launch.options))
            if key not in known:
                known[key] = compile_launch(launch, capability)
            yield f"{label(shape, dtype)}/{name}", launch, known[key]


def blocks_per_multiprocessor(resources, capability):
    """How many blocks of a kernel fit by registers and by shared memory (of which each block costs 1 KB more)."""
    by_registers = REGISTERS // (resources.registers * resources.num_warps * 32)
    by_memory = (SHARED_LIMIT[capability] + 1024) // (resources.shared_bytes + 1024)
    return min(by_registers, by_memory)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(capability):
    rows = {}
    for name, _, resources in compiled((*network_shapes(), *LONG), capability, torch.bfloat16):
        check_resources(resources, capability, matrix=True)
        rows[name] = resources
        warps = resources.num_warps * blocks_per_multiprocessor(resources, capability)
        assert warps >= 8, "fewer than two warps for each of the four schedulers"
    check_table(f"attention_sm{capability}", rows)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shapes_that_fit_no_tile_neither_spill_nor_leave_the_tensor_cores(capability):
    for _, _, resources in compiled(ODD, capability, torch.float16):
        check_resources(resources, capability, matrix=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_single_precision_is_ieee_and_does_not_spill(capability):
    for _, _, resources in compiled(SINGLE, capability, torch.float32):
        check_resources(resources, capability, matrix=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_gradient_that_is_a_slice_of_channels_is_described_by_its_strides(arch):
    for shape in network_shapes():
        dense, sliced = (launches(shape, arch, sliced=flag) for flag in (False, True))
        assert dense.keys() == sliced.keys()
        for name in sliced.keys() - {"forward", "jvp"}:
            found, width = sliced[name].arguments, shape.num_heads * shape.head_dim
            assert (found["DOUT_STRIDE_P"], found["DOUT_STRIDE_N"]) == (2 * width, 2 * width * shape.tokens)
            assert dense[name].arguments["DOUT_STRIDE_P"] == width


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_softmax_sees_whole_rows_up_to_256_tokens_and_an_8x8_image_is_one_program(arch):
    for shape in network_shapes():
        found = launches(shape, arch)
        whole = shape.tokens <= 256
        assert all(("BLOCK_T" in found[name].arguments) == whole for name in ("forward", "jvp"))
        assert ("backward" in found) == (shape.tokens <= 64)
        for launch in found.values():
            tiles = -(-shape.tokens // launch.arguments.get("BLOCK_M", shape.tokens))
            parts = -(-shape.head_dim // launch.arguments.get("BLOCK_V", shape.head_dim))
            assert launch.grid == (NUM * shape.num_heads * tiles * parts,)
