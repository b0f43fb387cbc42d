"""The optimizer kernels on a GPU: against fp64 in full size, bit by bit twice, under a CUDA graph, compiled."""

import pytest
import torch
from optimizer_cases import BAD, SHAPES, Case, assert_as_exact, same_bits

from fastcm.kernels.optimizer import (
    FlatLayout,
    apex_unavailable,
    optimizer_step,
    optimizer_step_apex,
    optimizer_step_reference,
)
from fastcm.kernels.runtime.fallback import failures, set_strict
from fastcm.random import Stream
from fastcm.train.optimizer import Optimizer, WeightAverage

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FULL = {"averages": 3, "copy_dtype": torch.bfloat16, "loss_scale": 1024.0}
LONG, CONV = list(SHAPES).index("long"), list(SHAPES).index("conv")


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)
    assert failures() == {}


@pytest.mark.parametrize("kind", ["adam", "radam"])
@pytest.mark.parametrize("options", [{}, FULL, {"averages": 1, "copy_dtype": torch.float16}])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_two_hundred_steps_follow_the_reference(kind, options, grad_dtype):
    runs = Case(device=CUDA, **options), Case(device=CUDA, **options), Case(torch.float64, device=CUDA, **options)
    functions = optimizer_step, optimizer_step_reference, optimizer_step_reference
    for step in range(200):
        for case, function in zip(runs, functions, strict=True):
            grads = case.grads(step, grad_dtype)
            if step % 3 == 1:
                grads[CONV] = grads[CONV].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
                grads[LONG] = torch.cat([grads[LONG][:1], grads[LONG]])[1:]  # at an odd address
                grads[2] = None
            case.step(function, grads, kind)
    assert_as_exact(*runs)


@pytest.mark.parametrize("bad", BAD)
def test_non_finite_step_changes_no_bit(bad):
    case = Case(device=CUDA, **FULL)
    case.step(optimizer_step, case.grads(0))
    grads, before = case.grads(1), case.bits()
    grads[LONG][8193] = bad
    finite, _ = case.step(optimizer_step, grads)
    assert finite == 0
    assert same_bits(case.bits(), before)


def network_sized(seed, dtype, count=40):
    """Weights of 256 -> 256 convolutions: 23 million elements."""
    draw = Stream(seed, "optimizer gpu")
    return [draw.normal(torch.arange(256, device=CUDA), (2304,), i).reshape(256, 256, 3, 3).to(dtype) for i in range(count)]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_full_size_against_fp64_and_twice(grad_dtype):
    results = []
    for dtype, function in [
        (torch.float32, optimizer_step),
        (torch.float32, optimizer_step),
        (torch.float32, optimizer_step_reference),
        (torch.float64, optimizer_step_reference),
    ]:
        params = network_sized(0, dtype)
        layout = FlatLayout({str(i): p for i, p in enumerate(params)})
        m, v, ema = layout.zeros(CUDA, dtype), layout.zeros(CUDA, dtype), layout.flatten(params, dtype)
        steps, lr = torch.zeros((), dtype=dtype, device=CUDA), torch.tensor(1e-2, dtype=dtype, device=CUDA)
        options = {"kind": "radam", "betas": (0.9, 0.99), "eps": 1e-8, "averages": [ema]}
        options["ema_betas"] = torch.tensor([0.99], dtype=dtype, device=CUDA)
        for step in range(8):
            grads = [g.to(grad_dtype).to(dtype if dtype == torch.float64 else grad_dtype) for g in network_sized(step, dtype)]
            _, norm = function(params, grads, m, v, steps, lr, **options)
        results.append([*params, m, v, ema, norm])
    first, second, plain, exact = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for found, beside, truth in zip(first, plain, exact, strict=True):
        error, expected = ((side.double() - truth).abs().max() for side in (found, beside))
        assert error <= 2 * expected + 2e-7 * truth.abs().max()


def optimizer_and_loss():
    params = {str(i): torch.nn.Parameter(p) for i, p in enumerate(network_sized(0, torch.float32, 3))}
    average = WeightAverage(params)
    optimizer = Optimizer(params, "radam", (0.9, 0.99), 1e-8, averages=[average], copy_dtype=torch.bfloat16)
    return optimizer, lambda scale: sum((p.square() * scale).sum() for p in params.values())


def test_captured_step_is_the_eager_step():
    """Learning rate, beta and loss scale change between replays; one replay has a gradient that is not finite."""
    lrs, scales = [1e-3, 2e-3, 0.0, 1e-2, 5e-3], [1.0, 2.0, 1.0, float("inf"), 4.0]
    lr, beta, scale = (torch.ones((), device=CUDA) for _ in range(3))
    optimizer, loss = optimizer_and_loss()

    def step():
        loss(scale).backward()
        return optimizer.step(lr, beta[None] * 0.99, scale)

    before = [value.clone() for value in (*optimizer.params, *optimizer.state_dict().values())]
    lr.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        for value, saved in zip((*optimizer.params, *optimizer.state_dict().values()), before, strict=True):
            value.copy_(saved)
        for view, p in zip(optimizer.averages[0].averages.values(), optimizer.params, strict=True):
            view.copy_(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    eager, eager_loss = optimizer_and_loss()
    for i, (rate, factor) in enumerate(zip(lrs, scales, strict=True)):
        lr.fill_(rate)
        scale.fill_(factor)
        beta.fill_(1 - i / 100)
        graph.replay()
        eager_loss(scale).backward()
        result = eager.step(lr, beta[None] * 0.99, scale)
        assert torch.equal(captured[0], result[0])
        assert float(result[0]) == (factor != float("inf"))
        torch.empty(1 << 26, device=CUDA).fill_(torch.nan)  # what the graph reads is its own
    assert all(torch.equal(a, b) for a, b in zip(optimizer.params, eager.params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.copies.values(), eager.copies.values(), strict=True))
    assert torch.equal(optimizer.averages[0].flat_P, eager.averages[0].flat_P)


def test_compiled_step_is_the_eager_step():
    (optimizer, loss), (eager, eager_loss) = optimizer_and_loss(), optimizer_and_loss()
    one, lr, betas = torch.ones((), device=CUDA), torch.tensor(1e-3, device=CUDA), torch.tensor([0.9], device=CUDA)
    step = torch.compile(optimizer.step, fullgraph=True)
    for _ in range(3):
        loss(one).backward()
        step(lr, betas)
        eager_loss(one).backward()
        eager.step(lr, betas)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.params, eager.params, strict=True))
    assert torch.equal(optimizer.averages[0].flat_P, eager.averages[0].flat_P)


@pytest.mark.skipif(apex_unavailable("adam") is not None, reason="NVIDIA apex is not installed")
def test_apex_follows_the_reference():
    found, exact = Case(device=CUDA, **FULL), Case(torch.float64, device=CUDA, **FULL)
    for step in range(50):
        for case, function in ((found, optimizer_step_apex), (exact, optimizer_step_reference)):
            case.step(function, case.grads(step))
    for name, truth in exact.state().items():
        if truth.numel() and not name.startswith("copy/"):
            torch.testing.assert_close(found.state()[name].double(), truth, rtol=1e-3, atol=1e-5)
