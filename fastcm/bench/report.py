"""What was measured, for people and for the next comparison: tables, files, and what became slower."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastcm.bench.cases import Case
from fastcm.bench.costs import case_cost
from fastcm.bench.hardware import DATA_SHEETS
from fastcm.bench.measure import OK, UNAVAILABLE, Row, best_timing
from fastcm.errors import ConfigError
from fastcm.io.atomic import atomic_write

KEY = ("op", "pass", "shapes", "shape", "batch", "dtype", "backend")
HEADER = ("op", "pass", "shape", "backend", "kernel us", "p20-p80", "call us", "GB/s", "of copy", "error")


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns aligned: the first ones left, those that hold numbers right."""
    table = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    numeric = [all(_is_number(line[i]) for line in table[1:]) for i in range(len(header))]
    pad = [str.rjust if right else str.ljust for right in numeric]
    return "\n".join("  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in table)


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit()


def kernel_table(result: dict[str, Any]) -> str:
    """The rows of ``measure`` as text; a row without a speed says why."""
    environment, copy = result["environment"], result["copy_bytes_per_s"] / 1e9
    title = f"{environment['device']}, torch {environment['packages']['torch']}, copy {copy:.1f} GB/s"
    if environment["device"] == "cpu":
        title += "\nno CUDA device: the references on the CPU by the host's clock, no kernel times"
    lines = [_kernel_line(row) for row in result["rows"] if row["status"] != UNAVAILABLE]
    return "\n".join([title, "", text_table(HEADER, lines), *_notes(result["rows"])])


def _notes(rows: Sequence[Row]) -> list[str]:
    """Why rows have no speed, each reason once."""
    counts = Counter((row["backend"], row["status"], row["reason"]) for row in rows if row["status"] != OK)
    lines = [f"{backend} {status} ({number} rows): {reason}" for (backend, status, reason), number in counts.items()]
    return ["", *lines] if lines else []


def _kernel_line(row: Row) -> list[str]:
    head = [row["op"], row["pass"], row["shape"], row["backend"]]
    if row["status"] != OK:
        return [*head, *"-" * 5, row["status"]]
    kernel, call = row["kernel"], row["call"]
    spread = best_timing(row)
    return [
        *head,
        f"{kernel['median_us']:.1f}" if kernel else "-",
        f"{spread.p20_us:.1f}-{spread.p80_us:.1f}",
        f"{call['median_us']:.1f}",
        f"{row['bytes_per_s'] / 1e9:.0f}",
        f"{row['copy_share']:.2f}",
        f"{row['relative_error']:.0e}",
    ]


def floor_table(cases: Iterable[Case]) -> str:
    """Shapes, calls, bytes, operations and floors from data-sheet rates: nothing in it is measured."""
    lines = []
    for case in cases:
        lines.append([case.op, case.direction, case.label, str(case.calls), *_floors(case)])
    header = ["op", "pass", "shape", "calls", "MB", "GFLOP", *(f"{name} us" for name in DATA_SHEETS)]
    note = "floors from data-sheet rates, one call each; calls are per forward pass of the network"
    return f"{text_table(header, lines)}\n\n{note}"


def _floors(case: Case) -> list[str]:
    cost = case_cost(case)
    floors = [cost.floor_s(sheet.bytes, sheet.flops(case.dtype)) * 1e6 for sheet in DATA_SHEETS.values()]
    return [f"{cost.bytes / 1e6:.2f}", f"{cost.flops / 1e9:.3f}", *(f"{floor:.1f}" for floor in floors)]


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    atomic_write(path, as_json(result, indent=1) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON in the strict sense: what is not a finite number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote; raises ConfigError naming the file for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["environment"]["device"], result["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of 'fastcm bench kernels --json': {type(error).__name__}: {error}") from None
    return result


def slower(new: dict[str, Any], old: dict[str, Any], percent: float) -> list[list[str]]:
    """Rows of both results that got slower by more than ``percent``, or lost their speed: lines of a table.

    Raises ConfigError where nothing can be compared: another device, or no row in common.
    """
    devices = [result["environment"]["device"] for result in (old, new)]
    if devices[0] != devices[1]:
        raise ConfigError(f"--compare: measured on {devices[0]}, this is {devices[1]}; times of two devices do not compare")
    before = {_key(row): row for row in old["rows"] if row["status"] == OK}
    pairs = [(before[_key(row)], row) for row in new["rows"] if _key(row) in before]
    if not pairs:
        raise ConfigError(f"--compare: no row of the old result was measured again; rows are equal in {', '.join(KEY)}")
    return [line for was, now in pairs if (line := _slower_line(was, now, percent))]


def _slower_line(was: Row, now: Row, percent: float) -> list[str] | None:
    head = [str(now[name]) for name in ("op", "pass", "shape", "backend")]
    old_us = best_timing(was).median_us
    if now["status"] != OK:
        return [*head, f"{old_us:.1f}", "-", now["status"]]
    new_us = best_timing(now).median_us
    change = 100 * (new_us / old_us - 1)
    return [*head, f"{old_us:.1f}", f"{new_us:.1f}", f"{change:+.1f} %"] if change > percent else None


SLOWER_HEADER = ("op", "pass", "shape", "backend", "old us", "new us", "change")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
