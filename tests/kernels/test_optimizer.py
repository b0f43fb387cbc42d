"""The optimizer step on the CPU: its reference, checks, registration, layout, tables, cost and how apex is called."""

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from optimizer_cases import BAD, SHAPES, Case, assert_as_exact, same_bits

from fastcm.kernels.optimizer import (
    FlatLayout,
    apex_unavailable,
    optimizer_step,
    optimizer_step_apex,
    optimizer_step_reference,
    step_scalars,
)
from fastcm.kernels.optimizer.cost import norm_cost, step_cost, update_cost
from fastcm.kernels.optimizer.layout import ALIGNMENT, is_dense
from fastcm.kernels.optimizer.registration import _optimizer_step, _readable
from fastcm.kernels.optimizer.tables import chunk_table
from fastcm.kernels.runtime.fallback import KernelUnavailableError
from fastcm.train.optimizer import Optimizer, WeightAverage

FULL = {"averages": 3, "copy_dtype": torch.bfloat16, "loss_scale": 1024.0}
CONV, LONG = list(SHAPES).index("conv"), list(SHAPES).index("long")
LR = torch.tensor(1e-2)


def textbook(kind, p, m, v, g, t, lr, betas, eps):
    """One step in fp64 as the papers write it (Adam Alg. 1; RAdam Alg. 2)."""
    beta1, beta2 = betas
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    if kind == "adam":
        return p - lr * m_hat / ((v / (1 - beta2**t)) ** 0.5 + eps), m, v
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho <= 5:
        return p - lr * m_hat, m, v
    r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    return p - lr * m_hat * r * (1 - beta2**t) ** 0.5 / (v**0.5 + eps), m, v


@pytest.mark.parametrize("kind", ["adam", "radam"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.99)])
def test_reference_is_the_textbook(kind, betas):
    case = Case(torch.float64, averages=2)
    p = case.layout.flatten(case.params, torch.float64)
    m = v = torch.zeros_like(p)
    averages = [p.clone(), p.clone()]
    for step in range(12):
        grads = case.grads(step)
        finite, norm = case.step(optimizer_step_reference, grads, kind, betas)
        g = case.layout.flatten(grads, torch.float64)
        p, m, v = textbook(kind, p, m, v, g, step + 1, 1e-2, betas, 1e-8)
        averages = [beta * a + (1 - beta) * p for a, beta in zip(averages, case.ema_betas, strict=True)]
        torch.testing.assert_close(case.layout.flatten(case.params, torch.float64), p, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close((case.exp_avg_P, case.exp_avg_sq_P), (m, v), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(case.averages, averages, rtol=1e-12, atol=1e-14)
        assert finite == 1
        torch.testing.assert_close(norm, sum((grad**2).sum() for grad in grads).sqrt(), rtol=1e-12, atol=0)


def test_rectification_begins_above_rho_5():
    radam = [step_scalars(torch.tensor(float(t)), LR, "radam", (0.9, 0.999), 1e-8)[1] for t in range(1, 9)]
    assert [float(s) for s in radam] == [0, 0, 0, 0, 0, 1, 1, 1]  # rho_5 = 4.996, rho_6 = 5.994


@pytest.mark.parametrize("function", [optimizer_step, optimizer_step_reference])
@pytest.mark.parametrize("bad", BAD)
def test_non_finite_step_changes_no_bit(function, bad):
    case = Case(**FULL)
    case.params[0][0, :3] = torch.tensor([0.0, -0.0, 1e-45])
    case.exp_avg_P[:3] = torch.tensor([-0.0, 1e-45, -1e-45])
    case.averages[0][:2] = torch.tensor([-0.0, 1e-45])
    case.copy_P[0] = 5.0  # not what the parameter says: it may not be mended either
    grads, before = case.grads(0), case.bits()
    grads[LONG][8000] = bad
    finite, norm = case.step(function, grads)
    assert finite == 0
    assert not norm.isfinite()
    assert same_bits(case.bits(), before)
    assert case.step(function, case.grads(0))[0] == 1
    assert not same_bits(case.bits(), before)


def test_scaled_gradients_give_the_same_bits():
    plain, scaled = Case(), Case(loss_scale=1024.0)
    for step in range(5):
        assert torch.equal(plain.step(optimizer_step, plain.grads(step))[1], scaled.step(optimizer_step, scaled.grads(step))[1])
    assert same_bits(plain.bits(), scaled.bits())


def test_large_scaled_gradient_is_unscaled_before_it_is_squared():
    case = Case(loss_scale=1e30)
    grads = case.grads(0)
    assert not torch.linalg.vector_norm(grads[0]).isfinite()
    assert case.step(optimizer_step, grads)[0] == 1


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_foreign_gradients(grad_dtype):
    runs = Case(**FULL), Case(torch.float64, **FULL)
    for case in runs:
        for step in range(3):
            grads = case.grads(step % 2, grad_dtype)
            grads[CONV] = grads[CONV].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
            grads[0] = grads[0][:, :1].expand(70, 71)
            grads[2] = None
            case.step(optimizer_step if case.dtype == torch.float32 else optimizer_step_reference, grads)
    assert_as_exact(runs[0], runs[0], runs[1])
    for name, truth in runs[1].state().items():
        if truth.numel() and not name.startswith("copy/"):
            torch.testing.assert_close(runs[0].state()[name].double(), truth, rtol=1e-5, atol=1e-6)


def test_beta_of_zero_makes_the_average_the_parameters_exactly():
    case = Case(averages=1)
    case.ema_betas.zero_()
    case.averages[0] *= 1e3
    case.step(optimizer_step, case.grads(3))
    assert all(torch.equal(a, p) for a, p in zip(case.layout.views(case.averages[0]).values(), case.params, strict=True))


def arguments(case, grads):
    state = (case.exp_avg_P, case.exp_avg_sq_P, case.num_steps, LR, case.loss_scale)
    return (case.params, grads, *state, case.averages, case.ema_betas, case.copy_P, "radam", 0.9, 0.99, 1e-8)


@pytest.mark.parametrize("options", [{}, FULL])
@pytest.mark.parametrize("memory", ["dense", "permuted", "sliced", "absent"])
def test_opcheck(options, memory):
    case = Case(**options)
    grads = case.grads(0)
    if memory == "permuted":
        grads[CONV] = grads[CONV].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif memory == "sliced":
        grads[CONV] = torch.cat([grads[CONV], grads[CONV]], dim=1)[:, 5:]
    elif memory == "absent":
        grads[0] = None
    torch.library.opcheck(_optimizer_step, arguments(case, grads))


def named(requires_grad=True):
    case = Case()
    return {name: torch.nn.Parameter(p, requires_grad) for name, p in zip(SHAPES, case.params, strict=True)}


def optimizers():
    """The same optimizer twice, with all it can have."""
    both = named(), named()
    return [
        Optimizer(p, "radam", (0.9, 0.99), 1e-8, averages=[WeightAverage(p), WeightAverage(p)], copy_dtype=torch.bfloat16)
        for p in both
    ]


def test_compiled_step_is_the_plain_step():
    optimizer, reference = optimizers()
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        for target, function in ((optimizer, step), (reference, reference.step)):
            for p, grad in zip(target.params, Case().grads(i), strict=True):
                p.grad = grad * 8
            result = function(LR, torch.tensor([0.9, 0.5]), torch.tensor(8.0))
            assert result[0] == 1
            assert all(p.grad is None for p in target.params)
    pairs = [(optimizer.params, reference.params)]
    pairs += [([a.flat_P for a in optimizer.averages], [a.flat_P for a in reference.averages])]
    pairs += [(list(optimizer.copies.values()), list(reference.copies.values()))]
    pairs += [(list(optimizer.state_dict().values()), list(reference.state_dict().values()))]
    assert all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))


def test_copies_follow_the_parameters():
    optimizer, _ = optimizers()
    with torch.no_grad():
        optimizer.params[0] += 1
    assert not torch.equal(optimizer.copies["wide"], optimizer.params[0].bfloat16())
    optimizer.refresh_copies()
    for _ in range(2):
        for name, p in zip(SHAPES, optimizer.params, strict=True):
            assert torch.equal(optimizer.copies[name], p.bfloat16())
            assert optimizer.copies[name].stride() == p.stride()
            p.grad = torch.ones_like(p)
        optimizer.step(LR, torch.tensor([0.9, 0.5]))


def bad(**changes):
    """A call with something changed; what the case does not have is an argument of the step itself."""
    case, options = Case(averages=1, copy_dtype=torch.bfloat16), {"kind": "adam", "betas": (0.9, 0.99), "eps": 1e-8}
    given = {"params": case.params, "grads": case.grads(0), "lr": LR, "loss_scale": None, "exp_avg_P": case.exp_avg_P}
    given |= {"exp_avg_sq_P": case.exp_avg_sq_P, "num_steps": case.num_steps, "averages": case.averages}
    given |= {"ema_betas": case.ema_betas, "copy_P": case.copy_P, **options}
    return given | {name: change(given[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kind": "sgd"}, ValueError, "kind is 'sgd'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] is -0.1"),
        ({"params": [], "grads": []}, ValueError, "params is empty"),
        ({"params": lambda ps: [ps[0].half(), *ps[1:]]}, TypeError, r"params\[0\] has dtype float16"),
        ({"params": lambda ps: [torch.zeros(70, 142)[:, ::2], *ps[1:]]}, ValueError, r"params\[0\] has strides \(142, 2\)"),
        ({"grads": lambda gs: gs[1:]}, ValueError, "grads has 5 entries for 6 params"),
        ({"grads": lambda gs: [gs[1], *gs[1:]]}, ValueError, r"grads\[0\] has shape \(8195,\), expected \(70, 71\)"),
        ({"grads": lambda gs: [gs[0].double(), *gs[1:]]}, TypeError, r"grads\[0\] has dtype float64"),
        ({"grads": lambda gs: [gs[0].to("meta"), *gs[1:]]}, ValueError, r"grads\[0\] is on meta"),
        ({"exp_avg_P": lambda m: m[:-1]}, ValueError, r"exp_avg_P has shape \(13695,\), expected \(13696,\)"),
        ({"exp_avg_sq_P": lambda v: v.double()}, TypeError, "exp_avg_sq_P has dtype float64"),
        ({"exp_avg_sq_P": lambda v: torch.cat([v, v])[::2]}, ValueError, "exp_avg_sq_P has stride 2"),
        ({"averages": lambda a: [*a, a[0]]}, ValueError, "ema_betas has 1 values for 2 averages"),
        ({"ema_betas": None}, ValueError, "ema_betas has 0 values for 1 averages"),
        ({"ema_betas": lambda b: b.double()}, TypeError, "ema_betas has dtype float64"),
        ({"copy_P": lambda c: c.float()}, TypeError, "copy_P has dtype float32"),
        ({"num_steps": lambda n: n.long()}, TypeError, "num_steps has dtype int64"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, TypeError, "lr has dtype float64"),
        ({"loss_scale": torch.tensor(2.0, dtype=torch.float64)}, TypeError, "loss_scale has dtype float64"),
    ],
)
def test_bad_arguments_are_named(changes, error, words):
    given = bad(**changes)
    call = {name: given.pop(name) for name in ("params", "grads", "exp_avg_P", "exp_avg_sq_P", "num_steps", "lr")}
    function = inspect.unwrap(optimizer_step)  # without the shape checks that the tests put around it
    with pytest.raises(error, match=words):
        function(*call.values(), **given)


def test_a_layout_places_every_part_on_a_line_of_the_cache():
    case = Case()
    assert all(offset % ALIGNMENT == 0 for offset in case.layout.offsets)
    flat_P = case.layout.flatten(case.params)
    for name, view in case.layout.views(flat_P).items():
        assert view.stride() == case.layout.forms[case.layout.names.index(name)][1]
        assert torch.equal(view, case.params[case.layout.names.index(name)])


@pytest.mark.parametrize(
    ("value", "dense"),
    [
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(4, 6, 1, 1).permute(1, 0, 2, 3), True),
        (torch.zeros(24).as_strided((4, 1, 6), (6, 99, 1)), True),
        (torch.zeros(()), True),
        (torch.zeros(0, 5)[:, ::2], True),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(4, 1).expand(4, 6), False),
        (torch.zeros(8)[::2], False),
    ],
)
def test_dense_memory_is_told_from_other_memory(value, dense):
    assert is_dense(value) == dense
    if not dense:
        with pytest.raises(ValueError, match=r"params\['w'\] has strides"):
            FlatLayout({"w": value})


def test_only_gradients_in_another_order_are_copied():
    p, same = torch.zeros(4, 6, 1, 1).to(memory_format=torch.channels_last), torch.zeros(4, 6, 1, 1)
    assert p.stride() != same.stride()  # 1 x 1 kernels: strides of axes of size 1 say nothing
    assert _readable([p], [same])[0][0] is same
    assert _readable([p], [torch.zeros(6, 4, 1, 1).transpose(0, 1)])[0][0].stride() == p.stride()
    assert _readable([p, p], [None, same.half()])[1] == torch.float16
    assert _readable([p, p], [same, same.half()])[1] == torch.float32


def test_a_layout_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="params is empty"):
        FlatLayout({})


def test_chunks_cover_every_element_once():
    sizes = (4970, 8195, 3, 270, 1, 0, 8192)
    rows = chunk_table(sizes, 4096, torch.device("cpu"))
    assert [int(rows[rows[:, 0] == i, 2].sum()) for i in range(len(sizes))] == list(sizes)
    covered = torch.zeros(64 * 400, dtype=torch.int64)
    for tensor, start, count, place in rows.tolist():
        assert start % 4096 == 0
        assert 0 < count <= 4096
        assert place - start == [0, 4992, 13248, 13312, 13632, 13696, 13696][tensor]
        covered[place : place + count] += 1
    assert covered.max() == 1
    assert covered.sum() == sum(sizes)


def test_cost_counts_the_bytes_of_a_parameter():
    assert norm_cost(10).bytes == 40
    assert update_cost(10).bytes == 280
    assert step_cost(10, num_averages=1, copy_itemsize=2).bytes == 420
    assert step_cost(10, num_averages=3, grad_itemsize=2).bytes == 10 * (2 + 2 + 24 + 24)
    assert step_cost(10, 1).flops == 210
    assert update_cost(10, 1, copy_itemsize=2).write_bytes == 180


def fake_apex(calls):
    """What amp_C's two functions do, in PyTorch: the arguments in apex's order, chunk by chunk or not."""

    def unscale_l2norm(chunk, skip, lists, inverse, per_tensor):
        assert (skip.dtype, len(lists), per_tensor) == (torch.int32, 1, False)
        return torch.cat(lists[0]).mul(inverse).norm()[None], torch.empty(0)

    def adam(chunk, skip, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay, inverse):
        assert (skip.dtype, step.dtype, mode, bias_correction, decay) == (torch.int32, torch.int32, 0, 1, 0.0)
        calls.append(int(step))
        if skip.item() == 1:
            return
        for g, p, m, v in zip(*lists, strict=True):
            assert g.dtype == p.dtype == torch.float32
            g.mul_(inverse)
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).add_(g * g, alpha=1 - beta2)
            p.sub_(lr * (m / (1 - beta1 ** step.item())) / ((v / (1 - beta2 ** step.item())).sqrt() + eps))

    return SimpleNamespace(__spec__=object(), multi_tensor_unscale_l2norm=unscale_l2norm, multi_tensor_adam_capturable=adam)


def test_apex_is_given_what_it_asks_for(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "amp_C", fake_apex(calls))
    found, exact = Case(**FULL), Case(torch.float64, **FULL)
    for step in range(4):
        for case, function in ((found, optimizer_step_apex), (exact, optimizer_step_reference)):
            grads = case.grads(step, torch.bfloat16)
            grads[CONV] = grads[CONV].contiguous()
            grads[2] = None
            case.step(function, grads)
    before, grads = found.bits(), found.grads(0)
    grads[0][0, 0] = torch.nan
    assert found.step(optimizer_step_apex, grads)[0] == 0
    assert same_bits(found.bits(), before)
    assert calls == [1, 2, 3, 4, 4]
    for name, truth in exact.state().items():
        if truth.numel() and not name.startswith("copy/"):
            torch.testing.assert_close(found.state()[name].double(), truth, rtol=1e-5, atol=1e-6)


def test_apex_says_why_it_cannot(monkeypatch):
    monkeypatch.setitem(sys.modules, "amp_C", None)
    case = Case()
    assert "not installed" in apex_unavailable("adam")
    with pytest.raises(KernelUnavailableError, match="amp_C"):
        case.step(optimizer_step_apex, case.grads(0))
    with pytest.raises(KernelUnavailableError, match="no radam"):
        case.step(optimizer_step_apex, case.grads(0), "radam")


def test_the_step_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None\nimport torch\nfrom fastcm.train.optimizer import Optimizer\n"
    code += "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
    code += "assert Optimizer({'p': p}, 'adam', (0.9, 0.99), 1e-8).step(torch.tensor(0.1))[0] == 1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
