"""The shapes of the networks, read off the networks, against what is known of them."""

from collections import Counter
from math import prod

import pytest
import torch

from fastcm.bench.cases import DTYPES, OP_PASSES, PASSES, build, cases, describe, in_fp64, rotated, sliced
from fastcm.bench.shapes import ALL_SETS, AttentionShape, ConvShape, GroupNormShape, conv_calls, kernel_calls, parameter_shapes

CPU = torch.device("cpu")


def test_ddpmpp_norms_are_the_known_ones():
    calls = Counter()
    for shape, number in kernel_calls("ddpmpp32").items():
        if isinstance(shape, GroupNormShape):
            calls[shape.channels, shape.resolution] += number
    known = {(128, 32): 1, (256, 32): 15, (384, 32): 1, (512, 32): 4, (256, 16): 22, (512, 16): 5, (256, 8): 20, (512, 8): 5}
    assert calls == known


def test_ddpmpp_attention_is_the_known_one():
    calls = {shape: number for shape, number in kernel_calls("ddpmpp32").items() if isinstance(shape, AttentionShape)}
    assert calls == {AttentionShape(256, 1, 256): 5, AttentionShape(64, 1, 256): 1}


@pytest.mark.parametrize(("name", "gflop", "millions"), [("ddpmpp32", 42.03, 55.73), ("adm64", 206.83, 295.90)])
def test_convolutions_and_parameters_add_up(name, gflop, millions):
    total = sum(number * shape.flops_per_image for shape, number in conv_calls(name).items())
    assert total / 1e9 == pytest.approx(gflop, abs=0.01)
    assert sum(map(prod, parameter_shapes(name))) / 1e6 == pytest.approx(millions, abs=0.01)


def test_conv_flops_count_a_multiply_add_as_two():
    assert ConvShape(2, 3, 4, 3, 1, 1).flops_per_image == 2 * 2 * 3 * 9 * 16
    assert ConvShape(2, 3, 8, 6, 2, 2).flops_per_image == 2 * 2 * 3 * 36 * 16


@pytest.mark.parametrize("name", ALL_SETS)
def test_every_conv_of_the_network_has_odd_kernels_and_keeps_its_size(name):
    assert {(shape.kernel, shape.padding) for shape in conv_calls(name)} <= {(1, 0), (3, 1)}


@pytest.mark.parametrize("op", OP_PASSES)
def test_cases_cover_all_passes_and_the_costliest_shape_is_first(op):
    chosen = list(cases(op, "digits8", 2, DTYPES["bf16"], tuple(PASSES)))
    assert {case.direction for case in chosen} == set(OP_PASSES[op])
    assert all(case.calls >= 1 and case.label == describe(case.shape) for case in chosen)
    assert len({(case.label, case.direction) for case in chosen}) == len(chosen)


def problem_of(op, batch=6, dtype="fp32"):
    return build(next(cases(op, "digits8", batch, DTYPES[dtype], OP_PASSES[op])), CPU)


@pytest.mark.parametrize("op", [op for op in OP_PASSES if op != "optimizer"])
def test_inputs_are_random_repeatable_and_channels_last(op):
    one, two = problem_of(op, dtype="bf16"), problem_of(op, dtype="bf16")
    for name, value in one.tensors.items():
        assert torch.equal(value, two.tensors[name])
        if value.is_floating_point():
            assert value.float().std() > 0
        if value.ndim == 4:
            assert value.is_contiguous(memory_format=torch.channels_last)


def test_activations_have_a_mean_and_unit_spread():
    x = problem_of("group_norm", batch=32).tensors["x_NCHW"]
    assert x.mean().item() == pytest.approx(0.5, abs=0.05)
    assert x.std().item() == pytest.approx(1.0, abs=0.05)


def test_a_further_set_has_the_same_samples_in_other_memory_and_order():
    problem = problem_of("group_norm")
    moved = rotated(problem, 2)
    x, y = problem.tensors["x_NCHW"], moved.tensors["x_NCHW"]
    assert torch.equal(x.roll(2, 0), y)
    assert y.data_ptr() != x.data_ptr()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert moved.tensors["weight_C"] is problem.tensors["weight_C"]
    assert moved.options["dropout_key"].index_N.tolist() == problem.options["dropout_key"].index_N.roll(2).tolist()


def test_a_slice_takes_samples_and_their_keys_and_leaves_weights():
    part = sliced(problem_of("group_norm"), slice(1, 3))
    assert len(part.tensors["x_NCHW"]) == len(part.cotangent) == len(part.tangents["addend_NC"]) == 2
    assert part.options["dropout_key"].index_N.tolist() == [1, 2]
    assert part.tensors["weight_C"].shape == (32,)


def test_fp64_is_exactly_the_same_numbers():
    problem = problem_of("consistency_loss", dtype="bf16")
    wide = in_fp64(problem)
    assert wide.tensors["F_t"].dtype == torch.float64
    assert wide.tensors["boundary_N"].dtype == torch.bool
    assert torch.equal(wide.tensors["F_t"].bfloat16(), problem.tensors["F_t"])
    assert in_fp64(problem_of("add_noise", dtype="bf16")).options["dtype"] == torch.float64
