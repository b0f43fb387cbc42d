"""Adam and RAdam against torch's own, and the promise that a non-finite step changes nothing."""

import math

import pytest
import torch
from golden_cases import load_case

from fastcm.config import EMAConfig, OptimizerConfig
from fastcm.random import Stream
from fastcm.train.optimizer import Optimizer, WeightAverage
from fastcm.train.schedules import ema_beta, learning_rate, power_gamma

SHAPES = {"a": (7,), "b": (3, 5), "c": (2, 3, 3, 3)}
REFERENCE = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}
LR = torch.tensor(1e-2)


def parameters(dtype=torch.float32):
    draw = Stream(0, "optimizer test")
    return {name: torch.nn.Parameter(draw.normal(torch.arange(1), shape)[0].to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(params, step):
    for name, p in params.items():
        p.grad = Stream(step, f"gradient {name}").normal(torch.arange(1), tuple(p.shape))[0].to(p.dtype) * 10 ** (step % 5 - 2)


@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_updates_equal_torch_in_both_regimes(kind):
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, kind, (0.9, 0.99), 1e-8)
    reference = REFERENCE[kind](theirs.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in range(40):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(LR)
        reference.step()
        for name in SHAPES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=1e-6, msg=f"{kind} step {step} {name}")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_non_finite_step_changes_nothing_at_all(kind, bad):
    params = parameters()
    optimizer, average = Optimizer(params, kind, (0.9, 0.999), 1e-8), WeightAverage(params)
    for step in range(8):
        set_gradients(params, step)
        average.update(torch.tensor(0.9), optimizer.step(LR)[0])
    before = {
        k: v.clone()
        for k, v in {**params, **optimizer.state_dict(), **{f"ema{n}": a for n, a in average.averages.items()}}.items()
    }
    set_gradients(params, 9)
    params["b"].grad[1, 2] = bad
    finite, _ = optimizer.step(LR)
    average.update(torch.tensor(0.9), finite)
    after = {**params, **optimizer.state_dict(), **{f"ema{n}": a for n, a in average.averages.items()}}
    assert finite == 0
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_parameter_without_gradient_stays():
    params = parameters()
    optimizer = Optimizer(params, "adam", (0.9, 0.999), 1e-8)
    start = params["a"].detach().clone()
    set_gradients(params, 0)
    params["a"].grad = None
    optimizer.step(LR)
    assert torch.equal(params["a"], start)


def test_state_round_trip_continues_bit_for_bit():
    first, second = parameters(), parameters()
    one, two = (Optimizer(p, "radam", (0.9, 0.99), 1e-8) for p in (first, second))
    for step in range(10):
        set_gradients(first, step)
        one.step(LR)
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    with torch.no_grad():
        for name in SHAPES:
            second[name].copy_(first[name])
    for optimizer, params in ((one, first), (two, second)):
        set_gradients(params, 11)
        optimizer.step(LR)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_optimizer_compiles_without_graph_breaks():
    params, plain = parameters(), parameters()
    for target in (params, plain):
        set_gradients(target, 0)
    optimizer, reference = (Optimizer(p, "radam", (0.9, 0.99), 1e-8) for p in (params, plain))
    torch.compile(optimizer.step, fullgraph=True, backend="eager")(LR)
    reference.step(LR)
    assert all(torch.equal(params[name], plain[name]) for name in SHAPES)


def test_average_in_the_step_is_the_average_beside_it():
    together, beside = parameters(), parameters()
    inside, outside = WeightAverage(together), WeightAverage(beside)
    one = Optimizer(together, "radam", (0.9, 0.99), 1e-8, averages=[inside])
    two = Optimizer(beside, "radam", (0.9, 0.99), 1e-8)
    for step in range(8):
        beta = torch.tensor(ema_beta(EMAConfig(halflife_images=1000), 100 * step, 100))
        set_gradients(together, step)
        set_gradients(beside, step)
        one.step(LR, beta[None])
        outside.update(beta, two.step(LR)[0])
    assert all(torch.equal(inside.averages[name], outside.averages[name]) for name in SHAPES)
    assert all(torch.equal(together[name], beside[name]) for name in SHAPES)


def test_state_is_saved_by_the_names_of_the_parameters():
    state = Optimizer(parameters(), "adam", (0.9, 0.99), 1e-8).state_dict()
    assert list(state) == [f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in SHAPES] + ["num_steps"]
    assert [tuple(state[f"exp_avg/{name}"].shape) for name in SHAPES] == list(SHAPES.values())


def test_average_follows_its_half_life():
    params = {"a": torch.nn.Parameter(torch.zeros(1))}
    average = WeightAverage(params)
    params["a"].data.fill_(1.0)
    config = EMAConfig(halflife_images=1000)
    for step in range(10):
        average.update(torch.tensor(ema_beta(config, 100 * step, 100)), torch.tensor(1.0))
    torch.testing.assert_close(average.averages["a"], torch.tensor([0.5]))


def test_average_is_the_official_one():
    case = load_case("E_update_ema")
    params = {name: torch.nn.Parameter(case.tensors[f"in/target{name}"].clone()) for name in "01"}
    average = WeightAverage(params)
    for name, parameter in params.items():
        parameter.data.copy_(case.tensors[f"in/source{name}"])
    average.update(torch.tensor(case.config["rate"]), torch.tensor(1.0))
    for name in params:
        case.close(average.averages[name], f"out/target{name}")


def test_average_moves_at_a_very_long_half_life():
    params = {"a": torch.nn.Parameter(torch.zeros(1))}
    average = WeightAverage(params)
    params["a"].data.fill_(1.0)
    average.update(torch.tensor(ema_beta(EMAConfig(halflife_images=1e8), 0, 128)), torch.tensor(1.0))
    assert average.averages["a"].item() == pytest.approx(128 * math.log(2) / 1e8, rel=0.1)


def test_half_life_does_not_depend_on_the_batch_size():
    config = EMAConfig(halflife_images=887_184)
    assert ema_beta(config, 0, 128) == pytest.approx(0.9999, abs=1e-9)  # ECT's decay a step
    assert ema_beta(config, 0, 64) ** 2 == pytest.approx(ema_beta(config, 0, 128))


def test_half_life_ramps_up_with_the_images_seen():
    config = EMAConfig(halflife_images=500_000, rampup_ratio=0.05)
    assert ema_beta(config, 0, 512) == 0.0
    assert ema_beta(config, 1_000_000, 512) == pytest.approx(0.5 ** (512 / 50_000))
    assert ema_beta(config, 100_000_000, 512) == pytest.approx(0.5 ** (512 / 500_000))


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_function_exponents_are_the_published_ones(std, gamma):
    assert power_gamma(std) == pytest.approx(gamma, abs=0.005)  # arXiv 2312.02696, section 3.1


def test_power_function_average_has_the_asked_width():
    config, num, size = EMAConfig(kind="power", std=0.1), 4000, 1
    betas = [ema_beta(config, i, size) for i in range(num)]
    weights, later = [0.0] * num, 1.0
    for i in reversed(range(num)):
        weights[i], later = (1 - betas[i]) * later, later * betas[i]
    mean = sum(w * i / num for i, w in enumerate(weights))
    std = sum(w * (i / num - mean) ** 2 for i, w in enumerate(weights)) ** 0.5
    assert std == pytest.approx(0.1, rel=0.01)


def test_learning_rate_warms_up_and_cools_down_by_images():
    config = OptimizerConfig(lr=2.0, warmup_images=100, cooldown_images=200)
    rates = [learning_rate(config, images, 1000) for images in (0, 50, 100, 500, 800, 900, 1000)]
    assert rates == pytest.approx([0, 1, 2, 2, 2, 1, 0])
