"""Launch parameters pinned per architecture: which tile and how many warps a kernel uses is data, never a run-time search.

Each op has tables ``<op>/pinned/sm80.json`` and so on, which map a pass to rules; the first that holds wins:

    {"forward": [{"when": {"pixels": [0, 256]}, "use": {"slab": 64, "num_warps": 8}}, {"use": {"slab": 32, "num_warps": 16}}]}

``when`` gives inclusive ranges of the facts that the launcher states; a rule without it always holds and ends the list.
Fallback: a device uses the table of its major compute capability; where there is none, that of sm_80, which asks for the
least. ``fastcm bench --tune`` puts rules for exact shapes before the others.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = ("sm80", "sm90", "sm100")
BASELINE = "sm80"


@lru_cache
def architecture(device: torch.device) -> str:
    """The name of the table for a device; the baseline's for what is no CUDA device."""
    if device.type != "cuda":
        return BASELINE
    name = f"sm{torch.cuda.get_device_capability(device)[0]}0"
    return name if name in ARCHITECTURES else BASELINE


def table_path(op: str, arch: str) -> Path:
    """The file with the rules of one op on one architecture."""
    return Path(__file__).parent.parent / op / "pinned" / f"{arch}.json"


@lru_cache
def table(op: str, arch: str) -> dict[str, list[dict[str, Any]]]:
    """The rules of one op on one architecture by pass."""
    return json.loads(table_path(op, arch).read_text(encoding="utf-8"))


@lru_cache(maxsize=4096)
def _lookup(op: str, direction: str, arch: str, facts: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    stated = dict(facts)
    for rule in table(op, arch)[direction]:
        if all(low <= stated[fact] <= high for fact, (low, high) in rule.get("when", {}).items()):
            return rule["use"]
    raise LookupError(f"{table_path(op, arch)} has no rule of {direction!r} for {stated}")


class Question(NamedTuple):
    """What a launcher asks: the parameters of one pass of an op on an architecture, for the facts of one shape."""

    op: str
    direction: str
    arch: str
    facts: tuple[tuple[str, int], ...]


Answer = Callable[[Question, dict[str, Any]], dict[str, Any]]
_answers: list[Answer] = []


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Inside the block ``answer(question, pinned parameters)`` has the last word: how a tuner tries parameters."""
    _answers.append(answer)
    try:
        yield
    finally:
        _answers.remove(answer)


def forget_tables() -> None:
    """Read the files again: they have changed."""
    table.cache_clear()
    _lookup.cache_clear()


def pinned(op: str, direction: str, arch: str, **facts: int) -> dict[str, Any]:
    """The launch parameters of one pass ("forward") of an op on an architecture, for the facts of one shape."""
    question = Question(op, direction, arch, tuple(facts.items()))
    use = _lookup(*question)
    for answer in _answers:
        use = answer(question, use)
    return use
