"""Quantiles, sets of memory, and the order in which calls are timed."""

import itertools

import pytest
import torch

from fastcm.bench.ceilings import conv_times, copy_bandwidth, product_rate
from fastcm.bench.shapes import ConvShape
from fastcm.bench.timing import MAX_SAMPLES, MAX_SETS, MIN_SAMPLES, MIN_SETS, l2_bytes, num_sets, summarise, time_host

CPU = torch.device("cpu")


def test_quantiles_are_those_of_the_samples_in_microseconds():
    timing = summarise([1e-6 * value for value in (5, 1, 3, 2, 4, 6)])
    assert timing.median_us == pytest.approx(3.5)
    assert timing.p20_us == pytest.approx(2.0)
    assert timing.p80_us == pytest.approx(5.0)
    assert timing.n == 6


def test_sets_together_exceed_the_cache():
    l2 = 50 << 20
    for size in (1 << 20, 7 << 20, 40 << 20):
        assert num_sets(size, l2) * size >= 3 * l2
    assert num_sets(1 << 30, l2) == MIN_SETS
    assert num_sets(100, l2) == MAX_SETS
    assert num_sets(0, 0) == MIN_SETS
    assert l2_bytes(CPU) == 0


def test_host_times_rotate_through_the_sets_and_leave_the_first_call_out():
    ticks, calls = itertools.count(), []
    thunks = [lambda number=number: calls.append(number) for number in range(3)]
    timing = time_host(thunks, budget_s=0.0, clock=lambda: float(next(ticks)))
    assert timing.n == MIN_SAMPLES
    assert calls == [0, *itertools.islice(itertools.cycle(range(3)), MIN_SAMPLES)]
    assert timing.median_us == pytest.approx(1e6)


def test_host_times_end_with_the_budget_or_the_number():
    ticks = itertools.count(step=0.001)
    assert time_host([lambda: None], 0.050, clock=lambda: next(ticks)).n == pytest.approx(50, abs=1)
    assert time_host([lambda: None], 1e9, clock=lambda: 0.0).n == MAX_SAMPLES


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr("fastcm.bench.ceilings.COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("fastcm.bench.ceilings.PRODUCT_SIDE", {"cpu": 16})
    assert 1e6 < copy_bandwidth(CPU, 0.0) < 1e13
    assert 1e4 < product_rate(CPU, budget_s=0.0) < 1e14


@pytest.mark.parametrize("shape", [ConvShape(4, 6, 8, 3, 1, 1), ConvShape(4, 6, 8, 1, 1, 0), ConvShape(4, 6, 8, 6, 2, 2)])
def test_conv_times_have_all_three_passes(shape):
    times = conv_times(shape, 2, CPU, 0.0)
    assert list(times) == ["fprop", "dgrad", "wgrad"]
    for value in times.values():
        assert value["flops_per_s"] == pytest.approx(2 * shape.flops_per_image / (value["time"]["median_us"] * 1e-6))


def test_conv_gradients_are_gradients():
    from fastcm.bench.ceilings import _conv, _conv_arguments

    shape = ConvShape(3, 5, 6, 3, 1, 1)
    x, weight, grad = (value.double() for value in _conv_arguments(shape, 2, CPU))
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(_conv(shape, "fprop", x, weight, grad), (x, weight), grad)
    found = _conv(shape, "dgrad", x, weight, grad)[0], _conv(shape, "wgrad", x, weight, grad)[1]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
