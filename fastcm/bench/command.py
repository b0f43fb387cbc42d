"""What the verbs of ``fastcm bench`` do; each returns the text to print."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastcm.bench import backends, measure, report, tune
from fastcm.bench.cases import DTYPES, OP_PASSES, PASSES, Case, cases
from fastcm.bench.report import floor_table
from fastcm.errors import ConfigError

__all__ = ["floor_table", "run_kernels", "run_tune", "select_cases"]

log = logging.getLogger("fastcm")


def select_cases(op: str | None, shapes: str, batch: int, dtype: str, directions: Sequence[str]) -> list[Case]:
    """The cases of one op, or of all; raises ConfigError where none is left."""
    ops, wanted = [op] if op else list(OP_PASSES), tuple(directions) or tuple(PASSES)
    chosen = [case for name in ops for case in cases(name, shapes, batch, DTYPES[dtype], wanted)]
    if not chosen and op and not list(cases(op, shapes, batch, DTYPES[dtype], tuple(PASSES))):
        raise ConfigError(f"--shapes {shapes}: this network has no {op}")
    if not chosen:
        raise ConfigError(f"--pass {' '.join(wanted)}: {op} has only {' '.join(OP_PASSES[op])}")
    return chosen


def run_kernels(
    chosen: Iterable[Case],
    device: torch.device,
    budget_s: float,
    wanted: Sequence[str] = (),
    file: Path | None = None,
    compare: Path | None = None,
    fail_over: float = 5.0,
) -> tuple[str, int]:
    """Measure, write ``file``, compare with an earlier one: the tables, and how many rows became slower.

    Raises ConfigError for an unknown backend or an old file that cannot be compared.
    """
    unknown = set(wanted) - set(backends.names())
    if unknown:
        raise ConfigError(f"--backend: no backend {', '.join(sorted(unknown))}; choose from {', '.join(backends.names())}")
    old = None if compare is None else report.load(compare)  # before the time is spent
    settings = measure.Settings(device, budget_s, tuple(wanted) or None)
    result = measure.measure(chosen, settings, progress=log.info)
    if file is not None:
        report.save(file, result)
    text = report.kernel_table(result)
    if old is None:
        return text, 0
    lines = report.slower(result, old, fail_over)
    if lines:
        text += f"\n\nslower by more than {fail_over:g} %:\n{report.text_table(report.SLOWER_HEADER, lines)}"
    return text, len(lines)


def run_tune(chosen: Sequence[Case], budget_s: float) -> str:
    """Tune on this machine's GPU and pin what was found; raises ConfigError without one."""
    if not torch.cuda.is_available():
        raise ConfigError("bench tune needs a CUDA device: launch parameters are measured, never guessed")
    return tune.summary(tune.tune(chosen, torch.device("cuda"), budget_s))
