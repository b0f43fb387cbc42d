"""Which implementation of a kernel runs: asked for by name, or the fastest that can; never a silent substitute.

A backend is asked for with ``use_backend``, in a configuration (``compute.backend``) or, for a whole process, with the
environment variable FASTCM_BACKEND; "auto" takes for each op the first backend of its row that runs on the device.
Where a kernel that should run cannot, its reference runs, one warning says why and ``fastcm info`` lists it; under ``strict``
(FASTCM_STRICT=1) it is an error.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastcm.errors import ConfigError
from fastcm.kernels.runtime.fallback import KernelUnavailableError, is_strict, set_strict, unavailable

log = logging.getLogger("fastcm")

AUTO, TORCH, TRITON = "auto", "torch", "triton"
ENVIRONMENT = "FASTCM_BACKEND"

_requested = os.environ.get(ENVIRONMENT, AUTO)


class Backend(NamedTuple):
    """One implementation of an op, and why it cannot run for images of this dtype on this device (None where it can)."""

    run: Callable[..., Any]
    unavailable: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None


class Choice(NamedTuple):
    """The backend that runs an op, and the reason in words."""

    backend: str
    reason: str


Row = Mapping[str, Backend]


def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels do not run for this device and dtype, in words."""
    return "float64 is left to the reference" if dtype == torch.float64 else unavailable(device)


@contextmanager
def use_backend(name: str, strict: bool | None = None) -> Iterator[None]:
    """Run the ops inside the block with this backend; "auto" means the fastest that can run.

    ``strict`` makes every fallback inside an error (KernelUnavailableError); None leaves that as it is. Compiled functions
    notice the change and compile again. Not for use from several threads at once.
    Raises ConfigError for a name that no op has.
    """
    global _requested
    check_name(name, "use_backend")
    before, _requested = _requested, name
    strict_before = set_strict(is_strict() if strict is None else strict)
    try:
        yield
    finally:
        _requested = before
        set_strict(strict_before)


def requested() -> str:
    """The name that holds now."""
    return _requested


# Every backend of any op, as ``register`` was told.
_names: set[str] = {AUTO, TORCH}


def register(rows: Mapping[str, Row]) -> None:
    """Make the names of these backends known to ``use_backend``."""
    _names.update(name for row in rows.values() for name in row)


def check_name(name: str, source: str) -> None:
    """Raise ConfigError for a backend that no op has; ``source`` says where the name stands."""
    if name not in _names:
        raise ConfigError(f"{source}: there is no backend {name!r} here; choose one of {', '.join(sorted(_names))}")


def choose(op: str, row: Row, device: torch.device, dtype: torch.dtype, preferred: str | None = None) -> Choice:
    """The backend that runs ``op`` now, and why; its row lists the backends, fastest first, and ends with "torch".

    ``preferred`` is the first choice of "auto" where the op has a table of its own.
    Raises KernelUnavailableError where that would be a fallback under ``strict``.
    """
    check_name(_requested, ENVIRONMENT)
    if _requested == AUTO:
        return _automatic(op, row, device, dtype, preferred)
    if _requested not in row:
        choice = _automatic(op, row, device, dtype, preferred)
        return Choice(choice.backend, f"{_requested} does not implement {op}")
    reason = row[_requested].unavailable(device, dtype)
    return Choice(_requested, "asked for by name") if reason is None else _fall_back(op, _requested, reason)


def _automatic(op: str, row: Row, device: torch.device, dtype: torch.dtype, preferred: str | None) -> Choice:
    order = sorted(row, key=lambda name: name != preferred)  # stable: the rest keeps its order
    reasons = {name: row[name].unavailable(device, dtype) for name in order}
    name = next(name for name in order if reasons[name] is None)
    if name == preferred:
        return Choice(name, "preferred for this shape on this architecture")
    if reasons.get(TRITON) and device.type == "cuda" and dtype != torch.float64:
        return _fall_back(op, TRITON, reasons[TRITON])
    if reasons.get(TRITON):
        return Choice(name, reasons[TRITON])
    return Choice(name, "fastest available" if len(row) > 1 else "the only implementation")


def _fall_back(op: str, wanted: str, reason: str) -> Choice:
    if is_strict():
        raise KernelUnavailableError(f"{op}: {wanted} cannot run: {reason}")
    _warn_once(op, wanted, reason)
    return Choice(TORCH, f"{wanted} cannot run: {reason}")


@lru_cache
def _warn_once(op: str, wanted: str, reason: str) -> None:
    log.warning("%s runs on its PyTorch reference, because %s cannot run: %s", op, wanted, reason)
