"""Where a Triton kernel cannot run, its reference does: said once, listed afterwards, an error where that is asked for."""

import logging
import os
import subprocess
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar, TypeVar

import torch

from .launch import INTERPRETED

log = logging.getLogger("fastcm")
Result = TypeVar("Result")

STRICT_ENVIRONMENT = "FASTCM_STRICT"
MIN_CAPABILITY = (8, 0)
# What the compiler says through exceptions that have no type of their own.
COMPILER_MESSAGES = ("PassManager::run failed", "C compiler", "ptxas")


class KernelUnavailableError(RuntimeError):
    """A Triton kernel was asked for strictly and cannot run here."""


class _State:
    """Ops that do not compile, ops that had a call too large for the device, and whether either is an error; per process."""

    strict = os.environ.get(STRICT_ENVIRONMENT) == "1"
    failures: ClassVar[dict[str, str]] = {}
    too_large: ClassVar[dict[str, str]] = {}


def set_strict(strict: bool) -> bool:
    """Make every fallback an error, or allow them; returns what held before. Default: environment FASTCM_STRICT=1."""
    before, _State.strict = _State.strict, strict
    return before


def is_strict() -> bool:
    """Whether a fallback is an error."""
    return _State.strict


def failures() -> dict[str, str]:
    """The ops whose Triton kernel failed to compile in this process, or had a call that was too large, with the reason."""
    return _State.too_large | _State.failures


def forget_failures() -> None:
    """Try kernels again that failed to compile: with other launch parameters they may not."""
    _State.failures.clear()
    _State.too_large.clear()


@lru_cache
def unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, in words; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def triton_or_reference(op: str, device: torch.device, triton: Callable[[], Result], reference: Callable[[], Result]) -> Result:
    """The result of ``triton``, or of ``reference`` where the kernel cannot run; raises KernelUnavailableError when strict.

    Only a failure to compile counts: whatever else a kernel raises is an error of its caller or of its author.
    """
    reason = unavailable(device) or _State.failures.get(op)
    if reason is None:
        try:
            return triton()
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            reason = _remember(op, error)
    if _State.strict:
        raise KernelUnavailableError(f"{op}: {reason}")
    return reference()


def _remember(op: str, error: Exception) -> str:
    """Note a failure to compile, which ends the use of the op's kernel, or a call too large for the device, which does not."""
    from triton.runtime.errors import OutOfResources

    lines = str(error).strip().splitlines() or ["no message"]
    reason = f"{type(error).__name__}: {lines[-1]}"
    only_this_call = isinstance(error, OutOfResources)
    noted = _State.too_large if only_this_call else _State.failures
    if noted.get(op) != reason:
        what = "is too large for this device in one of its calls" if only_this_call else "does not compile here"
        log.warning("the Triton kernel of %s %s, its reference runs instead: %s", op, what, reason)
    noted[op] = reason
    return reason


def _is_compile_failure(error: Exception) -> bool:
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError

    if isinstance(error, InterpreterError):
        return False
    if isinstance(error, TritonError | subprocess.CalledProcessError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in COMPILER_MESSAGES)
