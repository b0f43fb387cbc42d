"""The benchmark measures what is right and refuses what is wrong."""

import math

import pytest
import torch

from fastcm.bench import functional, measure
from fastcm.bench.backends import JVP_FORMULAS, Backend, backends, prepare, reference
from fastcm.bench.cases import OP_PASSES, PASSES, Case, ImageShape, build, cases
from fastcm.bench.check import oracle, verdict
from fastcm.bench.measure import FAILED, OK, UNAVAILABLE, Settings, rows
from fastcm.bench.shapes import AttentionShape, GroupNormShape
from fastcm.kernels.runtime.fallback import is_strict

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, 0.0)
SIZES = torch.arange(1.0, 10001.0, dtype=torch.float64)


def case_of(op, direction="fwd", batch=3, dtype=torch.float32):
    return next(cases(op, "digits8", batch, dtype, (direction,)))


def wrong_by(result, dtype=torch.float32):
    return verdict([result], [SIZES], dtype).problem


def test_rounding_is_no_error():
    assert wrong_by(SIZES.float()) is None
    assert wrong_by(SIZES.bfloat16(), torch.bfloat16) is None
    assert wrong_by((SIZES / 100).half() * 100, torch.float16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_one_wrong_element_of_many_is_noticed(dtype, value):
    one = SIZES.clone()
    one[7777] = value
    assert wrong_by(one, dtype)


def test_one_wrong_element_is_found_where_the_norm_forgives_it():
    many = torch.ones(200_000, dtype=torch.float64)
    one = many.clone()
    one[5] = 0
    assert "an element" in verdict([one], [many], torch.bfloat16).problem


def test_a_lower_precision_than_asked_for_is_noticed():
    assert "relative" in wrong_by(SIZES * (1 + 3e-4))  # as TF32 would give
    assert "relative" in wrong_by(SIZES * 1.02, torch.bfloat16)
    assert "relative" in wrong_by(SIZES * 1.003, torch.float16)


def test_missing_results_wrong_shapes_and_a_zero_truth_are_noticed():
    assert "1 results instead of 2" in verdict([SIZES], [SIZES, SIZES], torch.float32).problem
    assert verdict([SIZES[:-1]], [SIZES], torch.float32).problem
    zeros = torch.zeros(4, dtype=torch.float64)
    assert verdict([zeros], [zeros], torch.float32).problem is None
    assert verdict([zeros + 0.1], [zeros], torch.float32).problem
    assert verdict([zeros[:0]], [zeros[:0]], torch.float32).problem is None


@pytest.mark.parametrize(("op", "direction"), [("group_norm", "bwd"), ("group_norm", "jvp"), ("attention", "bwd")])
def test_the_oracle_of_parts_is_the_oracle_of_the_whole(op, direction, monkeypatch):
    case = case_of(op, direction, batch=5)
    problem = build(case, CPU)
    whole = oracle(case, problem)
    monkeypatch.setattr("fastcm.bench.check.ORACLE_CHUNK", 2)
    for one, other in zip(oracle(case, problem), whole, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op", OP_PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_baseline_passes_its_check_and_is_timed(op, dtype):
    chosen = list(cases(op, "digits8", 3, dtype, tuple(PASSES)))
    for case in chosen if op == "optimizer" else {case.direction: case for case in chosen}.values():
        found = {row["backend"]: row for row in rows(case, SETTINGS)}
        assert found["triton"]["status"] == UNAVAILABLE
        assert found["torch"]["status"] == OK, found["torch"]["reason"]
        assert FAILED not in {row["status"] for row in found.values()}, found
        for row in found.values():
            assert ("call" in row) == (row["status"] == OK)
            assert (row["reason"] is None) == (row["status"] == OK)


def rows_of_a_backend(monkeypatch, backend, op="group_norm", direction="fwd", **options):
    monkeypatch.setattr(functional, "backends", lambda case, device: [backend])
    return list(rows(case_of(op, direction, **options), SETTINGS))


def scaled(**arguments):
    return reference("group_norm")(**arguments) * 1.001


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_gradient(**arguments):
    return _WrongGradient.apply(reference("group_norm")(**arguments))


@pytest.mark.parametrize(("run", "direction"), [(scaled, "fwd"), (scaled, "bwd"), (scaled, "jvp"), (wrong_gradient, "bwd")])
def test_a_wrong_backend_has_an_error_and_no_speed(monkeypatch, run, direction):
    (row,) = rows_of_a_backend(monkeypatch, Backend("mine", run), direction=direction)
    assert row["status"] == FAILED
    assert "above" in row["reason"]
    assert row["relative_error"] == pytest.approx(1e-3, rel=0.3)
    assert not {"call", "kernel"} & set(row)


def test_a_wrong_gradient_does_not_show_in_the_forward(monkeypatch):
    (row,) = rows_of_a_backend(monkeypatch, Backend("mine", wrong_gradient))
    assert row["status"] == OK


def test_a_backend_that_raises_is_recorded_and_the_rest_goes_on(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("out of\nluck")

    for name, status in (("mine", FAILED), ("xformers", UNAVAILABLE)):
        (row,) = rows_of_a_backend(monkeypatch, Backend(name, broken))
        assert (row["status"], row["reason"]) == (status, "RuntimeError: out of luck")
    assert not is_strict()


def test_results_that_are_not_written_are_noticed(monkeypatch):
    def lazy(**arguments):
        result = reference("group_norm")(**arguments)
        result[0, 0, 0, 0] = torch.full((1,), math.nan)[0]
        return result

    (row,) = rows_of_a_backend(monkeypatch, Backend("mine", lazy))
    assert row["status"] == FAILED


@pytest.mark.parametrize("op", ["add_noise", "consistency_loss"])
def test_a_reference_that_stands_in_for_a_kernel_gets_no_speed(monkeypatch, op):
    monkeypatch.setattr("fastcm.bench.backends.unavailable", lambda device: None)  # as if Triton ran here
    found = {row["backend"]: row for row in rows(case_of(op), Settings(CPU, 0.0, ("triton",)))}
    assert found["triton"]["status"] == FAILED
    assert "KernelUnavailableError" in found["triton"]["reason"]


def test_only_what_is_wanted_is_measured():
    heard = []
    chosen = [case_of("group_norm"), case_of("attention")]
    result = measure.measure(chosen, Settings(CPU, 0.0, ("torch",)), heard.append, copy_bytes_per_s=1e9)
    assert [(row["op"], row["backend"]) for row in result["rows"]] == [("group_norm", "torch"), ("attention", "torch")]
    assert heard == [f"{case.op} fwd {case.label}" for case in chosen]
    assert result["copy_bytes_per_s"] == 1e9


def test_bytes_per_second_come_from_the_cost_model_and_the_device_time():
    row = {"read_bytes": 600, "write_bytes": 400, "kernel": None, "call": {"median_us": 4.0, "p20_us": 3, "p80_us": 5, "n": 9}}
    assert measure.finish_row(row, 1e9)["bytes_per_s"] == pytest.approx(250e6)
    assert measure.finish_row(row, 1e9)["copy_share"] == pytest.approx(0.25)
    with_kernel = {**row, "kernel": {"median_us": 2.0, "p20_us": 1, "p80_us": 3, "n": 9}}
    assert measure.finish_row(with_kernel, 1e9)["copy_share"] == pytest.approx(0.5)


SHAPES = [
    ("group_norm", GroupNormShape(12, 4, 3, addend=True, film=False, silu=True, dropout=True)),
    ("group_norm", GroupNormShape(12, 4, 3, addend=False, film=True, silu=True, dropout=True)),
    ("group_norm", GroupNormShape(12, 4, 3, addend=False, film=True, silu=False, dropout=False)),
    ("attention", AttentionShape(16, 2, 6)),
    ("consistency_loss", ImageShape(3, 5)),
]


@pytest.mark.parametrize(("op", "shape"), SHAPES)
def test_a_jvp_formula_is_the_derivative(op, shape):
    case = Case(op, "digits8", shape, 1, 3, torch.float64, "jvp")
    problem = build(case, CPU)
    arguments, formula = JVP_FORMULAS[op]
    for one, other in zip(formula(*arguments(problem)), oracle(case, problem), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("op", "shape"), SHAPES)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "jvp"])
def test_our_ops_take_the_arguments_they_are_given(op, shape, direction):
    """Without a GPU and not strict, the registered ops compute by their references."""
    case = Case(op, "digits8", shape, 1, 3, torch.float32, direction)
    problem = build(case, CPU)
    results = prepare(next(b for b in backends(case, CPU) if b.name == "triton"), problem, direction)()
    assert verdict([value.detach() for value in results], oracle(case, problem), torch.float32).problem is None


def test_passes_are_named_once():
    assert set().union(*OP_PASSES.values()) == set(PASSES)


def test_a_backward_call_can_be_repeated():
    case = case_of("group_norm", "bwd")
    thunk = prepare(Backend("torch", reference("group_norm")), build(case, CPU), "bwd")
    for one, other in zip(thunk(), thunk(), strict=True):
        assert torch.equal(one, other)
