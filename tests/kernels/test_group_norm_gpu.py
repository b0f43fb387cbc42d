"""Group norm on a GPU: the networks' shapes, repeatability, CUDA graphs and torch.compile."""

import pytest
import torch

from fastcm.bench.shapes import SHAPE_SETS, GroupNormShape, kernel_calls
from fastcm.kernels.group_norm import group_norm, group_norm_jvp, group_norm_reference
from fastcm.kernels.runtime.fallback import set_strict
from fastcm.random import Stream

pytestmark = pytest.mark.gpu

EPS = 1e-6
BATCH = 8
SHAPES = sorted({shape for name in SHAPE_SETS for shape in kernel_calls(name) if isinstance(shape, GroupNormShape)})
MAIN = GroupNormShape(256, 32, 32, addend=True, film=False, silu=True, dropout=True)
ODD = GroupNormShape(30, 7, 10, addend=True, film=True, silu=True, dropout=True)
NAMES = ("x", "weight", "bias", "addend", "scale", "shift")


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)


def draw(purpose, *shape):
    return Stream(5, purpose).normal(torch.arange(shape[0]), shape[1:])


def image(purpose, shape, dtype):
    size = (shape.channels, shape.resolution, shape.resolution)
    return Stream(5, purpose).image_normal(torch.arange(BATCH), size).cuda().to(dtype)


def problem(shape, dtype):
    """(differentiable arguments by name, options), with activations that have a mean."""
    c = shape.channels
    values = {"x": image("x", shape, dtype) + 1, "weight": 1 + draw("weight", c).cuda(), "bias": draw("bias", c).cuda()}
    values |= {"addend": draw("addend", BATCH, c).cuda().to(dtype) if shape.addend else None}
    values |= {name: 0.3 * draw(name, BATCH, c).cuda().to(dtype) if shape.film else None for name in ("scale", "shift")}
    key = Stream(6, "dropout").at(torch.arange(BATCH, device="cuda"), draw=4)
    return values, {"silu": shape.silu, "dropout": 0.1 * shape.dropout, "dropout_key": key if shape.dropout else None}


def call(norm, groups, values, options):
    x, weight, bias, addend, scale, shift = (values[name] for name in NAMES)
    return norm(x, groups, weight, bias, EPS, addend_NC=addend, scale_NC=scale, shift_NC=shift, **options)


def results(norm, groups, values, options, dy):
    """y and all gradients, by name."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items() if value is not None}
    y = call(norm, groups, values | leaves, options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def cast(values, dtype):
    return {name: None if value is None else value.to(dtype) for name, value in values.items()}


def in_same_precision(x, groups, weight, bias, eps, *, addend_NC, scale_NC, shift_NC, silu, dropout, dropout_key):
    """What plain PyTorch does in the dtype of x, op by op; its dropout is that of the reference."""
    x = x if addend_NC is None else x + addend_NC[:, :, None, None]
    y = torch.nn.functional.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    y = y if scale_NC is None else y * (1 + scale_NC[:, :, None, None]) + shift_NC[:, :, None, None]
    y = torch.nn.functional.silu(y) if silu else y
    if dropout_key is None:
        return y
    ones = torch.ones(x.shape[1], device=x.device)
    # Group norm of anything with weight 0 and bias 1 is 1: what is left is the mask over 1 - p.
    return y * group_norm_reference(x.detach(), groups, 0 * ones, ones, eps, dropout=dropout, dropout_key=dropout_key)


def check(found, truth, plain):
    """At most twice the error of plain PyTorch in the same precision, both against fp64."""
    for name, value in found.items():
        error, allowed = ((result[name].double() - truth[name]).abs().max().item() for result in (found, plain))
        size = truth[name].abs().max().item()
        assert error <= 2 * allowed + 1e-5 * size, (name, error, allowed)
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, ODD], ids=str)
def test_errors_are_those_of_the_precision(shape, dtype):
    values, options = problem(shape, dtype)
    dy = image("dy", shape, dtype)
    found = results(group_norm, shape.num_groups, values, options, dy)
    truth = results(group_norm_reference, shape.num_groups, cast(values, torch.float64), options, dy.double())
    check(found, truth, results(in_same_precision, shape.num_groups, values, options, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, ODD], ids=str)
def test_jvp_is_the_difference_quotient(shape, dtype):
    values, options = problem(shape, dtype)
    tx, x = image("tx", shape, dtype), values["x"].double()
    rows = {f"{name}_NC": values[name] for name in NAMES[3:]}
    affine = (shape.num_groups, values["weight"], values["bias"], EPS)
    y, ty = group_norm_jvp(values["x"], tx, *affine, **rows, **options)
    exact, step = cast(values, torch.float64), 1e-5
    after, before = (
        call(group_norm_reference, shape.num_groups, exact | {"x": x + sign * step * tx.double()}, options) for sign in (1, -1)
    )
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(ty.double(), (after - before) / (2 * step), rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(y.double(), (after + before) / 2, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [MAIN, ODD], ids=str)
def test_results_repeat_bit_for_bit(shape):
    values, options = problem(shape, torch.bfloat16)
    dy = image("dy", shape, torch.bfloat16)
    first, second = (results(group_norm, shape.num_groups, values, options, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mean", [50, 500])
@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_a_mean_far_from_zero_costs_no_precision(mean, resolution):
    shape = MAIN._replace(resolution=resolution)
    x, one = image("x", shape, torch.float32) + mean, torch.ones(shape.channels, device="cuda")
    expected = group_norm_reference(x.double(), shape.num_groups, one, 0 * one, EPS)
    torch.testing.assert_close(group_norm(x, shape.num_groups, one, 0 * one, EPS).double(), expected, rtol=0, atol=2e-5)


def test_a_cuda_graph_replays_it_on_new_samples():
    values, options = problem(MAIN, torch.bfloat16)
    dy = image("dy", MAIN, torch.bfloat16)
    results(group_norm, MAIN.num_groups, values, options, dy)  # compiles what is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(group_norm, MAIN.num_groups, values, options, dy)
    values["x"].mul_(1.5)
    options["dropout_key"].index_N.add_(100)
    graph.replay()
    expected = results(group_norm, MAIN.num_groups, values, options, dy)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", [MAIN, ODD], ids=str)
def test_compiled_code_gives_the_same_bits(shape):
    values, options = problem(shape, torch.bfloat16)
    leaves = [value.requires_grad_() for value in values.values() if value is not None]

    def step():
        y = call(group_norm, shape.num_groups, values, options)
        return torch.cat([y, values["x"]], dim=1)  # the gradient comes back as a slice

    dy = torch.cat([image("dy", shape, torch.bfloat16)] * 2, dim=1)
    plain = torch.autograd.grad(step(), leaves, dy)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(), leaves, dy)
    for actual, expected in zip(compiled[1:], plain[1:], strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(compiled[0], plain[0])
