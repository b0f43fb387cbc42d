"""The optimizer kernels, interpreted, against the reference in fp64 and fp32."""

import pytest
import torch
from optimizer_cases import BAD, CPU, SHAPES, Case, assert_as_exact, same_bits

from fastcm.kernels.optimizer import fused, optimizer_step, optimizer_step_reference, step_scalars, tables
from fastcm.kernels.runtime.launch import run

FULL = {"averages": 3, "copy_dtype": torch.bfloat16, "loss_scale": 1024.0}
LONG, CONV = list(SHAPES).index("long"), list(SHAPES).index("conv")


def finish(case, sums_C, kind="adam", betas=(0.9, 0.99)):
    """(finite, norm, scalars) from sums of squares by chunk: the second launch alone."""
    finite, norm, scratch = torch.empty(()), torch.empty(()), fused.Scratch(sums_C, torch.empty(4))
    chunks_C4, addresses = torch.empty(len(sums_C), 4, dtype=torch.int64), torch.empty(12, dtype=torch.int64)
    state = (case.exp_avg_P, case.exp_avg_sq_P, case.num_steps, torch.tensor(1e-2))
    rest = {"grad_dtype": torch.float32, "num_averages": 0, "loss_scale": None, "ema_betas": None, "copy_P": None}
    launches = fused.step_launches(
        finite, norm, scratch, chunks_C4, addresses, *state, kind=kind, betas=betas, eps=1e-8, arch="sm80", **rest
    )
    run(launches[1:2], CPU)
    return finite, norm, scratch.scalars


@pytest.mark.parametrize("kind", ["adam", "radam"])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.999), (0.5, 0.9999)])
def test_scalars_match_fp64(kind, betas):
    case = Case()
    for t in [1, 2, 3, 4, 5, 6, 7, 10, 100, 12_345, 10**6]:
        case.num_steps.fill_(t - 1)
        _, _, scalars = finish(case, torch.ones(9), kind, betas)
        expected = step_scalars(torch.tensor(float(t)), torch.tensor(1e-2), kind, betas, 1e-8)
        torch.testing.assert_close(scalars[:3].double(), torch.stack(expected), rtol=1e-6, atol=0)
        assert scalars[3] == t


def test_scalars_of_averages_longer_than_the_run():
    case, betas = Case(), (0.99999, 0.999999)
    for t in [1, 2**17, 10**6, 2**24 - 1]:
        case.num_steps.fill_(t - 1)
        expected = step_scalars(torch.tensor(float(t)), torch.tensor(1e-2), "adam", betas, 1e-8)
        torch.testing.assert_close(
            finish(case, torch.ones(1), betas=betas)[2][:3].double(), torch.stack(expected), rtol=1e-6, atol=0
        )


def test_beta_of_zero_makes_the_average_the_parameters_exactly():
    case = Case(averages=1)
    case.ema_betas.zero_()
    case.averages[0] *= 1e3
    case.step(optimizer_step, case.grads(3))
    assert all(torch.equal(a, p) for a, p in zip(case.layout.views(case.averages[0]).values(), case.params, strict=True))


def test_the_step_count_waits_for_the_last_launch():
    case = Case()
    finish(case, torch.ones(2))
    assert case.num_steps == 0


def test_more_chunks_than_one_program_reads_at_once():
    sums_C = torch.arange(2500.0)
    finite, norm, _ = finish(Case(), sums_C)
    assert finite == 1
    torch.testing.assert_close(norm, sums_C.sum().sqrt())
    sums_C[2499] = torch.nan
    assert finish(Case(), sums_C)[0] == 0


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy's, of the bad steps
@pytest.mark.parametrize(
    ("kind", "num_steps", "options"),
    [("adam", 20, {}), ("radam", 200, FULL), ("adam", 200, {"averages": 1, "copy_dtype": torch.float16})],
)
def test_many_steps_follow_the_reference(kind, num_steps, options):
    runs = Case(**options), Case(**options), Case(torch.float64, **options)
    functions = optimizer_step, optimizer_step_reference, optimizer_step_reference
    for step in range(num_steps):
        is_bad = step % 50 == 4
        results = []
        for case, function in zip(runs, functions, strict=True):
            grads = case.grads(step)
            if is_bad:
                grads[LONG][8193] = BAD[step // 50]
                before = case.bits() if case.dtype == torch.float32 else None
                if case.dtype == torch.float64:
                    continue  # fp64 can hold the square of 3e38
            results.append(case.step(function, grads, kind))
            if is_bad:
                assert same_bits(case.bits(), before), step
        assert {float(finite) for finite, _ in results} == {0.0 if is_bad else 1.0}
        if not is_bad:
            torch.testing.assert_close(results[0][1], results[2][1].float(), rtol=2e-6, atol=0)
        if step in (3, 8, num_steps - 1):
            assert_as_exact(*runs)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_gradients_in_foreign_memory_and_dtype(kind, grad_dtype):
    runs = Case(**FULL), Case(**FULL), Case(torch.float64, **FULL)
    functions = optimizer_step, optimizer_step_reference, optimizer_step_reference
    for step in range(7):
        for case, function in zip(runs, functions, strict=True):
            # Permuted, expanded, a slice at an odd address, absent: each in turn, one of them always aligned.
            grads = case.grads(step % 2, grad_dtype)
            grads[CONV] = grads[CONV].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
            grads[0] = grads[0][:, :1].expand(70, 71)
            bucket = torch.cat([grads[LONG][:1], grads[LONG]])
            grads[LONG] = bucket[1:]
            grads[2] = None
            case.step(function, grads, kind)
    assert_as_exact(*runs)


def test_gradients_of_several_dtypes_and_one_that_comes_and_goes():
    runs = Case(), Case(), Case(torch.float64)
    functions = optimizer_step, optimizer_step_reference, optimizer_step_reference
    for step in range(4):
        for case, function in zip(runs, functions, strict=True):
            grads = case.grads(0, torch.float16)
            grads[0] = case.grads(0)[0]
            grads[LONG] = None if step % 2 else grads[LONG]
            case.step(function, grads)
    assert_as_exact(*runs)


def test_parameter_at_an_odd_address():
    runs = Case(), Case(), Case(torch.float64)
    functions = optimizer_step, optimizer_step_reference, optimizer_step_reference
    for case in runs:
        memory = torch.cat([case.params[LONG][:1], case.params[LONG]])
        case.params[LONG] = memory[1:]
    for case, function in zip(runs, functions, strict=True):
        for step in range(3):
            case.step(function, case.grads(step))
    assert_as_exact(*runs)


def test_every_step_is_bit_reproducible():
    first, second = Case(**FULL), Case(**FULL)
    for step in range(5):
        results = [case.step(optimizer_step, case.grads(step), "radam") for case in (first, second)]
        assert torch.equal(*(norm for _, norm in results))
    assert same_bits(first.bits(), second.bits())


def test_memory_between_the_parts_is_left_alone():
    case = Case(**FULL)
    covered = torch.zeros_like(case.exp_avg_P)
    for view in case.layout.views(covered).values():
        view.fill_(1)
    for flat_P in (case.exp_avg_P, case.exp_avg_sq_P, *case.averages, case.copy_P):
        flat_P[covered == 0] = 7
    case.step(optimizer_step, case.grads(0))
    assert all((flat_P[covered == 0] == 7).all() for flat_P in (case.exp_avg_P, *case.averages, case.copy_P))


def test_same_tensors_need_no_new_table(monkeypatch):
    written = []
    monkeypatch.setattr(tables, "_written_table", lambda *key: written.append(key) or torch.tensor(key[0]))
    case, grads = Case(), Case().grads(0)
    for _ in range(3):
        case.step(optimizer_step, grads)
    assert len(written) == 1
    case.step(optimizer_step, [grads[0].clone(), *grads[1:]])
    assert len(written) == 2


def test_a_kernel_that_does_not_compile_leaves_the_whole_step_to_the_reference(monkeypatch):
    from triton.errors import TritonError

    from fastcm.kernels.runtime import fallback

    def fail(*_):
        raise TritonError("no such instruction")

    class Broken:
        def __getitem__(self, grid):
            return lambda **_: fail()

    monkeypatch.setattr(fallback._State, "failures", {})
    monkeypatch.setattr(fused, "update_kernel", Broken())
    found, plain = Case(), Case()
    found.step(optimizer_step, found.grads(0))
    plain.step(optimizer_step_reference, plain.grads(0))
    assert "no such instruction" in fallback.failures()["adam_step"]
    assert same_bits(found.bits(), plain.bits())
