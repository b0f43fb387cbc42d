"""The noise kernel compiled for GPUs that are not there: registers, spills, wide loads, no approximate mathematics."""

import pytest
import torch
from ahead_of_time.compiler import check_resources, check_table, compile_distinct, compile_launch

from fastcm.bench.shapes import SHAPE_SETS
from fastcm.kernels.noise import NoisedInputs
from fastcm.kernels.noise.forward import add_noise_launches
from fastcm.kernels.philox import PhiloxKey

NUM = 128
IMAGES = {name: shape for name, (_, shape, _, _) in SHAPE_SETS.items()}


def meta(shape, dtype=torch.float32, memory_format=torch.channels_last):
    return torch.empty((NUM, *shape), dtype=dtype, device="meta", memory_format=memory_format)


def launch(arch, shape, dtype, *, pair=True, given=False, memory_format=torch.channels_last, key=(3, 0xDEADBEEF), draw=0):
    index = torch.empty(NUM, dtype=torch.int64, device="meta")
    noise = meta(shape) if given else PhiloxKey(key, index, draw)
    levels = [torch.empty(NUM, device="meta") if place < 2 or pair else None for place in range(4)]
    out = NoisedInputs(*(meta(shape, each) for each in (torch.float32, dtype) * (2 if pair else 1)))
    (found,) = add_noise_launches(meta(shape, memory_format=memory_format), noise, *levels, out, arch)
    return found


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = {"ect": {}, "edm": {"pair": False}}
CASES = {
    f"{kind}_{name}_{dtype}": (shape, DTYPES[dtype], options)
    for kind, options in KINDS.items()
    for name, shape in IMAGES.items()
    for dtype in DTYPES
}
CASES |= {
    "ect_ddpmpp32_given": (IMAGES["ddpmpp32"], torch.bfloat16, {"given": True}),
    "ect_ddpmpp32_nchw": (IMAGES["ddpmpp32"], torch.bfloat16, {"memory_format": torch.contiguous_format}),
    "digits_bf16": ((1, 8, 8), torch.bfloat16, {}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_resources(capability):
    launches = {name: launch(f"sm{capability}", *case[:2], **case[2]) for name, case in CASES.items()}
    rows = compile_distinct(launches, capability)
    for name, resources in rows.items():
        # A pixel of plain NCHW images is three loads of one element, and one of the digits has not 16 bytes per thread.
        check_resources(resources, capability, matrix=False, wide=name not in ("ect_ddpmpp32_nchw", "digits_bf16"))
        assert resources.registers * resources.num_warps * 32 <= 65536 // 2
    check_table(f"noise_sm{capability}", rows)


def test_a_key_of_one_compiles_like_any_other():
    """The launcher makes constants of integers that are 1, and PyTorch's seeds are often 1."""
    compile_launch(launch("sm90", IMAGES["ddpmpp32"], torch.float32, key=(1, 1), draw=1), 90)
    parameters = {parameter.name: parameter for parameter in launch("sm90", (3, 4, 4), torch.float32).kernel.params}
    assert all(parameters[word].do_not_specialize for word in ("key0", "key1", "draw"))
