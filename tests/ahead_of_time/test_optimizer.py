"""The optimizer kernels compiled for GPUs that are not there, as the DDPM++ and ADM-64 networks launch them."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from ahead_of_time.compiler import check_resources, check_table, compile_launch, specialisation

from fastcm.bench.shapes import SHAPE_SETS
from fastcm.config import load_config
from fastcm.kernels.optimizer import fused
from fastcm.kernels.optimizer.layout import flat_offsets
from fastcm.kernels.optimizer.tables import chunk_table
from fastcm.kernels.runtime.pinned import pinned
from fastcm.nn.build import build_network

# Gradients, averages, copy, loss scale: plain fp32, what a bf16 network has, what fp16 with a loss scale has.
VARIANTS = {
    "plain": (torch.float32, 0, None, False),
    "average": (torch.float32, 1, None, False),
    "average-copy": (torch.float32, 1, torch.bfloat16, False),
    "bf16-3-averages-copy": (torch.bfloat16, 3, torch.bfloat16, False),
    "fp16-scaled-copy": (torch.float16, 1, torch.float16, True),
}
KINDS = {"plain": ("adam", "radam")}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def parameter_sizes(shape_set):
    config_name, image_shape, label_dim, augment_dim = SHAPE_SETS[shape_set][:4]
    with torch.device("meta"):
        net = build_network(load_config(config_name).network, image_shape, label_dim, augment_dim, dropout=0.1)
    return tuple(p.numel() for p in net.parameters())


def launches(sizes, arch, variant, kind="radam"):
    grad_dtype, num_averages, copy_dtype, scaled = VARIANTS[variant]
    num_elements = flat_offsets(sizes)[1]
    chunk = pinned("optimizer", "chunks", arch, elements=num_elements)["chunk"]
    num_chunks = len(chunk_table(sizes, chunk, torch.device("cpu")))
    return fused.step_launches(
        meta(),
        meta(),
        fused.Scratch(meta(num_chunks), meta(4)),
        meta(num_chunks, 4, dtype=torch.int64),
        meta(2 * len(sizes) + num_averages, dtype=torch.int64),
        meta(num_elements),
        meta(num_elements),
        meta(),
        meta(),
        grad_dtype=grad_dtype,
        num_averages=num_averages,
        kind=kind,
        betas=(0.9, 0.999),
        eps=1e-8,
        loss_scale=meta() if scaled else None,
        ema_betas=meta(num_averages) if num_averages else None,
        copy_P=None if copy_dtype is None else meta(num_elements, dtype=copy_dtype),
        arch=arch,
    )


@pytest.fixture(scope="module")
def sizes():
    return {shape_set: parameter_sizes(shape_set) for shape_set in ("ddpmpp32", "adm64")}


def check(launch, capability):
    resources = compile_launch(launch, capability)
    if launch.kernel is fused.finish_kernel:
        # One program whose few fp64 scalars cost nothing. In fp32 1 - beta2^t and rho_t lose their digits: with beta2 = 0.999
        # RAdam's rect at t = 6 to 10 is off by 0.1 to 0.4 %, Adam's first bias correction by 1e-5.
        check_resources(replace(resources, fp64_instructions=0), capability, matrix=False, wide=False)
        assert 0 < resources.fp64_instructions < 200
        return resources
    check_resources(resources, capability, matrix=False)
    if launch.kernel is fused.update_kernel:
        # Parameter, two moments and each average in 16-byte loads, an fp32 gradient too.
        assert resources.wide_loads >= 3 + launch.arguments["NUM_AVERAGES"] + (launch.arguments["GRAD"] == tl.float32)
    # Half of all warps of a multiprocessor find registers: that many hide the latency of memory.
    assert 65536 // (resources.registers * resources.num_warps * 32) * resources.num_warps >= 32, resources
    return resources


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_variant_compiles_within_its_gates(capability, sizes):
    rows = {}
    for variant in VARIANTS:
        for kind in KINDS.get(variant, ("radam",)):
            for launch in launches(sizes["ddpmpp32"], f"sm{capability}", variant, kind):
                facts = {key: value for key, value in launch.arguments.items() if not isinstance(value, torch.Tensor)}
                facts = {key: value for key, value in facts.items() if not key.startswith(("num_", "BETA", "EPS"))}
                dtypes = {key: str(v.dtype)[6:] for key, v in launch.arguments.items() if key == "copy_ptr" and v is not None}
                name = f"{launch.kernel.__name__} {' '.join(f'{k}={v}' for k, v in sorted({**facts, **dtypes}.items()))}"
                if name not in rows:
                    rows[name] = check(launch, capability)
    assert len(rows) == 10  # three norms, two finishes, five updates
    check_table(f"optimizer_sm{capability}", rows)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_all_networks_use_the_same_compiled_kernels(arch, sizes):
    for variant in VARIANTS:
        small, large = (launches(some, arch, variant) for some in sizes.values())
        for first, second in zip(small, large, strict=True):
            assert specialisation(first) == specialisation(second)
            assert first.options == second.options
            assert first.grid <= second.grid
