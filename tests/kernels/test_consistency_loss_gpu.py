"""The loss kernels on a GPU: against fp64 at full shapes, bit for bit twice, in a CUDA graph, compiled."""

import math

import pytest
import torch

from fastcm.kernels.consistency_loss import consistency_loss, consistency_loss_jvp, consistency_loss_reference, derivatives
from fastcm.kernels.consistency_loss.derivatives import Denoiser, Tangents, Target
from fastcm.kernels.runtime.fallback import failures, set_strict
from fastcm.random import Stream

pytestmark = pytest.mark.gpu

SHAPES = [(128, 3, 32, 32), (128, 3, 64, 64), (2, 3, 256, 256), (5, 3, 17, 23), (512, 1, 8, 8)]
OPTIONS = [("squared", 0.0), ("l2", 0.0), ("pseudo_huber", 0.03)]
LEAVES = (0, 1, 5)


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)
    assert "consistency_loss" not in failures()


def inputs(shape, dtype=torch.bfloat16, layout="channels_last"):
    """Student and teacher on the GPU; a third of the rows is at the boundary, where the teacher is NaN."""
    index = torch.arange(shape[0], device="cuda")

    def image(name, dtype=torch.float32):
        x = Stream(0, name).image_normal(index, shape[1:]).to(dtype)
        if layout == "slice":
            return torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, : shape[1]]
        return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)

    def positive(name):
        return Stream(0, name).uniform(index) + 0.1

    student = [image("F_t", dtype), image("x_t"), positive("c_skip_t"), positive("c_out_t"), image("clean"), positive("weight")]
    teacher = {
        "F_r": image("F_r", dtype),
        "x_r": image("x_r"),
        "c_skip_r": positive("c_skip_r"),
        "c_out_r": positive("c_out_r"),
    }
    teacher["boundary_N"] = index % 3 == 1
    teacher["F_r"][1::3], teacher["x_r"][1::3] = math.nan, math.inf
    return student, teacher


def with_gradients(function, student, teacher, cast=lambda value: value, **options):
    leaves = [cast(value.detach()) for value in student]
    for place in LEAVES:
        leaves[place].requires_grad_()
    others = {name: cast(value) for name, value in teacher.items()}
    loss = function(*leaves, **others, **options)
    return loss.detach(), *torch.autograd.grad(loss.mean(), [leaves[place] for place in LEAVES])


def double(value):
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_at_most_twice_those_of_pytorch(shape, dtype, layout):
    student, teacher = inputs(shape, dtype, layout)
    for distance, c in OPTIONS:
        options = {"distance": distance, "c": c}
        exact = with_gradients(consistency_loss_reference, student, teacher, double, **options)
        plain = with_gradients(consistency_loss_reference, student, teacher, **options)
        found = with_gradients(consistency_loss, student, teacher, **options)
        for kernel, baseline, truth in zip(found, plain, exact, strict=True):
            assert kernel.dtype == baseline.dtype
            error, allowed = (kernel - truth).abs().max(), (baseline - truth).abs().max()
            assert error <= 2 * allowed + 2e-6 * truth.abs().max()


def tangents_like(student):
    index = torch.arange(len(student[0]), device="cuda")
    moved = [Stream(1, name).image_normal(index, student[0].shape[1:]) for name in ("tF_t", "tx_t")]
    moved.append(Stream(1, "tweight").normal(index))
    return {name: value.to(student[place].dtype) for name, place, value in zip(TANGENTS, LEAVES, moved, strict=True)}


TANGENTS = ("tF_t", "tx_t", "tweight_N")


def jvp_in_closed_form(student, teacher, tangents, cast=lambda value: value, **options):
    student, moved = [cast(value) for value in student], Tangents(*(cast(tangents[name]) for name in TANGENTS))
    at_r = Denoiser(*(cast(teacher[name]) for name in ("F_r", "x_r", "c_skip_r", "c_out_r")))
    target = Target(student[4], at_r, teacher["boundary_N"])
    return derivatives.jvp(moved, Denoiser(*student[:4]), target, student[5], options["distance"], options["c"])


@pytest.mark.parametrize("layout", ["channels_last", "nchw", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_the_tangent_are_at_most_twice_those_of_pytorch(shape, dtype, layout):
    student, teacher = inputs(shape, dtype, layout)
    tangents = tangents_like(student)
    for distance, c in OPTIONS:
        options = {"distance": distance, "c": c}
        exact = jvp_in_closed_form(student, teacher, tangents, double, **options)
        plain = jvp_in_closed_form(student, teacher, tangents, **options)
        found = consistency_loss_jvp(*student, **teacher, **tangents, **options)
        for kernel, baseline, truth in zip(found, plain, exact, strict=True):
            assert kernel.dtype == torch.float32
            error, allowed = (kernel - truth).abs().max(), (baseline - truth).abs().max()
            assert error <= 2 * allowed + 2e-6 * truth.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tangent_does_not_depend_on_its_batch(shape):
    student, teacher = inputs(shape)
    named = teacher | tangents_like(student)
    whole, again = (consistency_loss_jvp(*student, **named) for _ in range(2))
    alone = consistency_loss_jvp(*(value[:1] for value in student), **{name: value[:1] for name, value in named.items()})
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert all(torch.equal(one[:1], other) for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_one_cuda_graph_and_one_compiled_graph_of_the_tangent(shape):
    student, teacher = inputs(shape)
    named = teacher | tangents_like(student)
    expected = consistency_loss_jvp(*student, **named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = consistency_loss_jvp(*student, **named)
    graph.replay()
    compiled = torch.compile(consistency_loss_jvp, fullgraph=True)(*student, **named)
    for results in (found, compiled):
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_call_gives_the_same_bits_in_any_batch(shape):
    student, teacher = inputs(shape)
    first, second = (with_gradients(consistency_loss, student, teacher) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    alone = consistency_loss(*(value[:1] for value in student), **{name: value[:1] for name, value in teacher.items()})
    assert torch.equal(alone, first[0][:1])


def test_a_nan_and_an_overflow_stay_in_their_sample():
    student, teacher = inputs((6, 3, 32, 32), torch.float32)
    student[0][0, 0, 0, 0], teacher["F_r"][2, 0, 0, 0], student[0][3] = math.nan, math.nan, 1e30
    loss, grad_F, *_ = with_gradients(consistency_loss, student, teacher)
    assert loss.isfinite().tolist() == [False, True, False, False, True, True]
    assert grad_F.isnan().flatten(1).all(1).tolist() == [True, False, True, True, False, False]


def test_gradients_at_zero_distance_are_zero():
    (F_t, x_t, c_skip, c_out, clean, weight), _ = inputs((4, 3, 32, 32))
    at_target = {"F_r": F_t, "x_r": x_t, "c_skip_r": c_skip, "c_out_r": c_out}
    found = with_gradients(consistency_loss, (F_t, x_t, c_skip, c_out, clean, weight), at_target)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_one_cuda_graph_of_forward_and_backward(shape):
    student, teacher = inputs(shape)
    expected = with_gradients(consistency_loss, student, teacher)
    leaves = [value.detach() for value in student]
    for place in LEAVES:
        leaves[place].requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(consistency_loss(*leaves, **teacher).mean(), [leaves[place] for place in LEAVES])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = consistency_loss(*leaves, **teacher)
        gradients = torch.autograd.grad(loss.mean(), [leaves[place] for place in LEAVES])
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(one, other) for one, other in zip((loss, *gradients), expected, strict=True))


def test_one_compiled_graph():
    student, teacher = inputs((16, 3, 32, 32))
    compiled = torch.compile(consistency_loss, fullgraph=True)
    expected, found = (with_gradients(function, student, teacher) for function in (consistency_loss, compiled))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
