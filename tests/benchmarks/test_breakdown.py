"""The split of a step by kernel: names as profilers print them, kernels of our own, floors from models and ceilings."""

import ast
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import breakdown
from benchmarks.gpu.breakdown import (
    ATTENTION,
    CONVOLUTION,
    COPY,
    ELEMENTWISE,
    LOSS,
    NORM,
    OPTIMIZER,
    PRODUCT,
    UNKNOWN,
    category,
)
from benchmarks.gpu.table import category_floors, markdown
from benchmarks.measuring.step_time import Event
from fastcm.bench.cases import GroupNormShape, cases
from fastcm.bench.costs import case_cost
from fastcm.bench.shapes import parameter_shapes

ROOT = Path(__file__).parents[2]

NAMES = {
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1"
    "_execute_segment_k_off_kernel__5x_cudnn": CONVOLUTION,
    "sm90_xmma_dgrad_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x32_warpgroupsize1x1x1_g1"
    "_execute_segment_k_on_kernel__5x_cudnn": CONVOLUTION,
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8>"
    "(cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc_align8::Params)": CONVOLUTION,
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>"
    "(cudnn::ops::nchw2nhwc_params_t<float>, __half const*, __half*)": CONVOLUTION,
    "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int)": CONVOLUTION,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x": ATTENTION,
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<256, 64, 64, 4>>()": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)": ATTENTION,
    "void (anonymous namespace)::softmax_warp_backward<c10::BFloat16, c10::BFloat16, float, 9, true, false>()": ATTENTION,
    "triton_per_fused__softmax_4": ATTENTION,
    "rows_jvp_kernel": ATTENTION,
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": PRODUCT,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1"
    "_execute_segment_k_off_kernel__5x_cublas": PRODUCT,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_32x32_128x2_tn>(T1::Params)": PRODUCT,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)": PRODUCT,
    "triton_red_fused_native_group_norm_0": NORM,
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*, float*, float*)": NORM,
    "backward_kernel": NORM,
    "gradient_kernel": LOSS,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "TensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>()": OPTIMIZER,
    "update_kernel": OPTIMIZER,
    "triton_poi_fused_convolution_silu_12": ELEMENTWISE,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>()": ELEMENTWISE,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>()": ELEMENTWISE,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::BFloat16, unsigned int, 4, 64, 64>()": ELEMENTWISE,
    "Memcpy DtoD (Device -> Device)": COPY,
    "Memset (Device)": COPY,
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": UNKNOWN,
}  # fmt: skip

FOLDERS = {"group_norm": NORM, "attention": ATTENTION, "consistency_loss": LOSS, "noise": LOSS, "optimizer": OPTIMIZER}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_category(name):
    assert category(name) == NAMES[name]


def our_kernels():
    """(folder, name) of every Triton function that has the name of a kernel."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield path.parent.name, node.name


def test_every_kernel_of_ours_is_known_by_its_folder():
    found = list(our_kernels())
    assert len(found) > 15
    shared = {name for folder, name in found if sum(name == other for _, other in found) > 1}
    assert shared == {"finish_kernel"}  # of the loss and of the optimizer
    for folder, name in found:
        assert category(name) == (OPTIMIZER if name in shared else FOLDERS[folder]), name


def test_kernels_side_by_side_count_once():
    events = [Event("a", 0.0, 1000.0), Event("b", 500.0, 1000.0), Event("c", 600.0, 100.0)]
    events += [Event("within b", 1200.0, 100.0), Event("d", 4000.0, 500.0)]
    assert breakdown.busy_ms(events) == pytest.approx(2.0)


def test_times_are_added_by_category():
    events = [Event("Memset (Device)", 0.0, 10.0), Event("update_kernel", 0.0, 20.0), Event("update_kernel", 0.0, 30.0)]
    found = breakdown.split([*events, Event("strange", 0.0, 1.0)])
    assert found["categories"][OPTIMIZER] == {"ms": pytest.approx(0.05), "kernels": 2}
    assert found["categories"][COPY]["kernels"] == 1
    assert found["unknown"] == ["strange"]


def test_costs_are_of_two_forward_passes_and_one_backward_pass():
    costs = breakdown.step_costs("ddpmpp32", 4, torch.bfloat16)
    elements = 0
    for case in cases("group_norm", "ddpmpp32", 4, torch.bfloat16, ("fwd",)):
        assert isinstance(case.shape, GroupNormShape)
        elements += case.calls * 4 * case.shape.channels * case.shape.resolution**2
    # Twice read and written, then x and dy read and dx written, two bytes each; vectors are little beside it.
    assert costs[NORM]["bytes"] == pytest.approx(elements * 2 * (2 * 2 + 3), rel=0.02)
    parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes("ddpmpp32"))
    assert costs[OPTIMIZER]["bytes"] == parameters * (4 + 28 + 8)  # finite check, update, one average
    one = sum(case.calls * case_cost(case).bytes for case in cases("attention", "ddpmpp32", 4, torch.bfloat16, ("fwd",)))
    back = sum(case.calls * case_cost(case).bytes for case in cases("attention", "ddpmpp32", 4, torch.bfloat16, ("bwd",)))
    assert costs[ATTENTION]["bytes"] == 2 * one + back


def item(**changes):
    costs = {NORM: {"bytes": 4_000_000, "flops": 10}, ATTENTION: {"bytes": 10, "flops": 8_000_000_000}}
    kinds = {NORM: {"ms": 5.0, "kernels": 3}, CONVOLUTION: {"ms": 40.0, "kernels": 9}, ELEMENTWISE: {"ms": 1.0, "kernels": 2}}
    value = {"batch": 64, "shapes": "ddpmpp32", "costs": costs, "categories": kinds, "busy_ms": 46.0, "unknown": []}
    step = {"step_ms": {"median": 50.0, "p20": 49.0, "p80": 51.0, "n": 9}, "images_per_s": 1280.0, "peak_memory_bytes": 2**30}
    step |= {"dtype": "bfloat16", "tf32": False, "compiled": True, "cuda_graph": True}
    return value | step | {"launches": 4, "kernels": 14, "kernel_ms": 46.0, "warm_up_s": 3.0} | changes


CEILINGS = {
    "copy": {"bytes_per_s": 4e9},
    "matmul bf16": {"flops_per_s": 2e12},
    "conv ddpmpp32": {"batch": 128, "fprop_ms": 10.0, "dgrad_ms": 11.0, "wgrad_ms": 13.0, **{
        f"{name}_flops_per_s": 1e12 for name in ("fprop", "dgrad", "wgrad")}},
}  # fmt: skip


def test_floors_are_the_larger_of_traffic_and_arithmetic_and_the_convolutions_alone():
    assert category_floors(item(), CEILINGS) == pytest.approx({NORM: 1.0, ATTENTION: 4.0, CONVOLUTION: 22.0})
    assert category_floors(item(), {}) == {}


def test_the_table_shows_floors_gaps_and_unknown_kernels():
    parts = {"ceilings": {"status": "done", "error": None, "items": CEILINGS}}
    parts["breakdown"] = {"status": "done", "error": None, "items": {"fastcm triton": item(unknown=["strange"])}}
    text = markdown({"smoke": False, "parts": parts})
    assert "| convolution | 40.00 | 9 | 22.00 | 1.82 |" in text
    assert "| norm | 5.00 | 3 | 1.00 | 5.00 |" in text
    assert "| elementwise and reduction | 1.00 | 2 | - | - |" in text
    assert "| nothing (gaps between kernels) | 4.00 | - | - | - |" in text
    assert "`strange`" in text
