"""Find launch parameters on the GPU at hand: for each shape the fastest that pass the check, pinned by an exact rule.

What a launcher may be told stands in ``kernels/<op>/pinned/<arch>.json``. The tuner runs a case once to hear what its
launchers ask, then changes one parameter after the other, keeps the fastest value and begins again until nothing helps.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcm.bench import functional, optimizer
from fastcm.bench.backends import Backend, Thunk
from fastcm.bench.cases import Case
from fastcm.bench.measure import OK, Settings, rows
from fastcm.bench.report import text_table
from fastcm.bench.timing import l2_bytes, measuring_stream, num_sets, time_graph
from fastcm.io.atomic import atomic_write
from fastcm.kernels.attention import preferred_backend
from fastcm.kernels.runtime.fallback import forget_failures, set_strict
from fastcm.kernels.runtime.pinned import Question, answering, architecture, forget_tables, table_path

log = logging.getLogger("fastcm")

# The values tried of parameters with these names; of any other integer those that are FACTORS times the present one.
VALUES = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5)}
FACTORS = (0.25, 0.5, 2.0, 4.0)
MAX_ROUNDS = 3
DISPATCHED = ("triton", "torch", "xformers")  # the implementations of attention that the pass "dispatch" may name
MIN_GAIN = 0.01  # a smaller gain is noise, and the general rule is kept

Use = dict[str, Any]
Timer = Callable[[Use], float]  # seconds of a call with these parameters; infinity where it fails or is wrong


class Found(NamedTuple):
    """What tuning one question gave: the parameters before and after, their times, and how many were tried."""

    question: Question
    before: Use
    use: Use
    before_s: float
    use_s: float
    tried: int

    @property
    def better(self) -> bool:
        """Whether the new parameters are worth a rule."""
        return self.use != self.before and self.use_s < (1 - MIN_GAIN) * self.before_s


def neighbours(use: Use, name: str) -> list[Use]:
    """The parameters with other values of one of them; a flag is flipped, what is no number is left alone."""
    value = use[name]
    if isinstance(value, bool):
        others: list[Any] = [not value]
    elif name in VALUES:
        others = [other for other in VALUES[name] if other != value]
    elif isinstance(value, int) and value > 0:
        others = [int(value * factor) for factor in FACTORS if value * factor >= 1 and value * factor == int(value * factor)]
    else:
        others = []
    return [{**use, name: other} for other in others]


def search(question: Question, start: Use, timer: Timer) -> Found:
    """Coordinate descent from ``start``: parameter by parameter, until a round changes nothing."""
    best, best_s, tried = start, timer(start), 1
    start_s = best_s
    known = {_frozen(start)}
    for _ in range(MAX_ROUNDS):
        before = best
        for name in start:
            for candidate in neighbours(best, name):
                if _frozen(candidate) in known:
                    continue
                known.add(_frozen(candidate))
                seconds, tried = timer(candidate), tried + 1
                if seconds < best_s:
                    best, best_s = candidate, seconds
        if best == before:
            break
    return Found(question, start, best, start_s, best_s, tried)


def _frozen(use: Use) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(use.items()))


def with_rule(table: dict[str, list[Use]], question: Question, use: Use) -> dict[str, list[Use]]:
    """A table with a rule for exactly these facts before the others; an older rule for the same facts is replaced."""
    when = {fact: [value, value] for fact, value in question.facts}
    others = [rule for rule in table[question.direction] if rule.get("when") != when]
    return {**table, question.direction: [{"when": when, "use": use}, *others]}


def pin(found: Found, path: Path | None = None) -> None:
    """Write the rule into the table of the op and architecture, whole or not at all."""
    question = found.question
    path = path or table_path(question.op, question.arch)
    table = with_rule(json.loads(path.read_text(encoding="utf-8")), question, found.use)
    atomic_write(path, format_table(table))
    forget_tables()


def format_table(table: dict[str, list[Use]]) -> str:
    """JSON with one rule a line, so that a change of one shape is a change of one line."""
    passes = []
    for direction, rules in table.items():
        lines = ",\n".join(f"  {json.dumps(rule)}" for rule in rules)
        passes.append(f" {json.dumps(direction)}: [\n{lines}\n ]")
    return "{\n" + ",\n".join(passes) + "\n}\n"


def questions(thunk: Thunk) -> dict[Question, Use]:
    """What the launchers of a call ask, with the answers that stand in the tables."""
    heard: dict[Question, Use] = {}

    def listen(question: Question, use: Use) -> Use:
        heard[question] = use
        return use

    with answering(listen):
        thunk()
    return heard


def tune(cases: Sequence[Case], device: torch.device, budget_s: float) -> list[Found]:
    """Tune every question of every case, and pin each gain as soon as it is found; then choose attention's backends."""
    results, known = [], set()
    before = set_strict(True)  # a reference that stands in for a failed candidate must not be timed
    try:
        for case in cases:
            with measuring_stream(device):
                for found in _tune_case(case, device, budget_s, known):
                    results.append(_keep(found))
        for case in {case.shape: case for case in cases if case.op == "attention"}.values():
            results.append(_keep(_tune_dispatch(case, device, budget_s)))
    finally:
        set_strict(before)
    return results


def _keep(found: Found) -> Found:
    if found.better:
        pin(found)
    return found


def _tune_case(case: Case, device: torch.device, budget_s: float, known: set[Question]) -> Iterable[Found]:
    work = optimizer.Work(case, device) if case.op == "optimizer" else functional.Work(case, device)
    backend = next(backend for backend in work.backends if backend.name == "triton")
    number = num_sets(work.set_bytes, l2_bytes(device))
    thunks = [work.prepare(backend, index) for index in range(number)]
    for question, use in questions(thunks[0]).items():
        if question not in known:
            known.add(question)
            log.info("tuning %s %s for %s", case.op, question.direction, case.label)
            yield search(question, use, _timer(work, backend, thunks, question, budget_s))


def _tune_dispatch(case: Case, device: torch.device, budget_s: float) -> Found:
    """Which implementation of attention is the fastest for a shape, its forward and backward pass together."""
    tokens, head_dim = case.shape.tokens, case.shape.head_dim
    question = Question("attention", "dispatch", architecture(device), (("tokens", tokens), ("head_dim", head_dim)))
    before = {"backend": preferred_backend(tokens, head_dim, question.arch)}
    seconds = {}
    for name in DISPATCHED:
        seconds[name] = sum(_time_backend(case._replace(direction=d), name, device, budget_s) for d in ("fwd", "bwd"))
    best = min(seconds, key=seconds.__getitem__)
    return Found(question, before, {"backend": best}, seconds[before["backend"]], seconds[best], len(seconds))


def _time_backend(case: Case, name: str, device: torch.device, budget_s: float) -> float:
    row = next(rows(case, Settings(device, budget_s, (name,))))
    return row["kernel"]["median_us"] * 1e-6 if row["status"] == OK else math.inf


def _timer(work: Any, backend: Backend, thunks: list[Thunk], question: Question, budget_s: float) -> Timer:
    def timer(use: Use) -> float:
        try:
            with answering(lambda asked, pinned: use if asked == question else pinned):
                if work.judge(backend).problem is not None:
                    return math.inf
                return time_graph(thunks, budget_s).median_us * 1e-6
        except Exception as error:  # too much shared memory, a tile the compiler refuses: no candidate, not the end
            log.debug("%s: %s", use, error)
            forget_failures()
            return math.inf

    return timer


def summary(results: Iterable[Found]) -> str:
    """What was tried and what was pinned."""
    lines = [
        [found.question.op, found.question.direction, " ".join(f"{name}={value}" for name, value in found.question.facts),
         str(found.tried), f"{found.before_s * 1e6:.1f}", f"{found.use_s * 1e6:.1f}",
         " ".join(f"{name}={value}" for name, value in found.use.items()) if found.better else "kept"]
        for found in results
    ]  # fmt: skip
    return text_table(("op", "pass", "facts", "tried", "us before", "us", "pinned"), lines)
