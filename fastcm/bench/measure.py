"""Rows of the kernel benchmark: every backend of every case checked against fp64, then timed; a wrong one has no speed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastcm.bench import functional, optimizer
from fastcm.bench.backends import OPTIONAL, Backend, Thunk
from fastcm.bench.cases import DTYPES, Case
from fastcm.bench.ceilings import copy_bandwidth
from fastcm.bench.check import Verdict, poison
from fastcm.bench.costs import case_cost
from fastcm.bench.hardware import environment
from fastcm.bench.timing import Timing, l2_bytes, measuring_stream, num_sets, time_eager, time_graph, time_host
from fastcm.kernels.runtime.fallback import set_strict

Row = dict[str, Any]
Progress = Callable[[str], None]

# What was found of a backend on a case.
OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"


class Settings(NamedTuple):
    """How to measure: device, seconds per measurement, backends wanted (None: all that suit the device)."""

    device: torch.device
    budget_s: float = 0.1
    wanted: tuple[str, ...] | None = None


def measure(
    cases: Iterable[Case],
    settings: Settings,
    progress: Progress = lambda line: None,
    copy_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """Environment, copy bandwidth of this run and one row per case and backend; ``progress`` hears of each case.

    copy_bytes_per_s: the bandwidth, where this process has measured it already.
    """
    copy = copy_bytes_per_s or copy_bandwidth(settings.device)
    result: dict[str, Any] = {"environment": environment(settings.device), "copy_bytes_per_s": copy, "rows": []}
    for case in cases:
        progress(f"{case.op} {case.direction} {case.label}")
        result["rows"] += [finish_row(row, copy) for row in rows(case, settings)]
    return result


def rows(case: Case, settings: Settings) -> Iterator[Row]:
    """One row per backend of a case."""
    work = optimizer.Work(case, settings.device) if case.op == "optimizer" else functional.Work(case, settings.device)
    for backend in work.backends:
        if settings.wanted is None or backend.name in settings.wanted:
            asked_for = settings.wanted is not None
            yield {**identity(case), "backend": backend.name, **_outcome(work, backend, settings, asked_for)}


def identity(case: Case) -> Row:
    """What makes two rows of two runs comparable, the backend apart, and what the call costs at least."""
    cost = case_cost(case)
    dtype = next(name for name, value in DTYPES.items() if value == case.dtype)
    return {
        "op": case.op,
        "pass": case.direction,
        "shapes": case.shape_set,
        "shape": case.label,
        "batch": case.batch,
        "dtype": dtype,
        "calls": case.calls,
        "read_bytes": cost.read_bytes,
        "write_bytes": cost.write_bytes,
        "flops": cost.flops,
    }


def _outcome(work: Any, backend: Backend, settings: Settings, asked_for: bool) -> Row:
    if backend.unavailable is not None:
        return {"status": UNAVAILABLE, "reason": backend.unavailable}
    if backend.name == "compile" and settings.device.type != "cuda" and not asked_for:
        return {"status": UNAVAILABLE, "reason": "compiled on CUDA, or where --backend names it"}
    before = set_strict(True)  # a reference that stands in for a kernel must not be timed as the kernel
    try:
        with measuring_stream(settings.device):
            return _checked_times(work, backend, settings)
    except Exception as error:  # every backend may fail in ways of its own, and the others are still to be measured
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"status": UNAVAILABLE if backend.name in OPTIONAL else FAILED, "reason": reason}
    finally:
        set_strict(before)
        if backend.name == "compile":
            torch.compiler.reset()


def _checked_times(work: Any, backend: Backend, settings: Settings) -> Row:
    poison(work.result_bytes, settings.device)
    verdict: Verdict = work.judge(backend)
    errors = {"relative_error": verdict.relative_error, "max_error": verdict.max_error}
    if verdict.problem is not None:
        return {"status": FAILED, "reason": verdict.problem, **errors}
    number = num_sets(work.set_bytes, l2_bytes(settings.device))
    thunks = [work.prepare(backend, index) for index in range(number)]
    return {"status": OK, "reason": None, **errors, "sets": number, **_times(thunks, settings)}


def _times(thunks: Sequence[Thunk], settings: Settings) -> Row:
    if settings.device.type != "cuda":
        return {"kernel": None, "call": time_host(thunks, settings.budget_s)._asdict()}
    call = time_eager(thunks, settings.budget_s)
    return {"kernel": time_graph(thunks, settings.budget_s)._asdict(), "call": call._asdict()}


def finish_row(row: Row, copy_bytes_per_s: float) -> Row:
    """Add the bytes moved per second, by the cost model, and their share of a copy; None where there is no time."""
    timing = best_timing(row)
    if timing is None:
        return {**row, "bytes_per_s": None, "copy_share": None}
    rate = (row["read_bytes"] + row["write_bytes"]) / (timing.median_us * 1e-6)
    return {**row, "bytes_per_s": rate, "copy_share": rate / copy_bytes_per_s}


def best_timing(row: Row) -> Timing | None:
    """The device time of a row, or where there is none the time of its call."""
    values = row.get("kernel") or row.get("call")
    return values and Timing(**values)
