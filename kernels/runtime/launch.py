"""A kernel launch as data: it can be run, and without a GPU it can be counted, compiled ahead of time and looked at."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import torch

# Triton reads the variable when a kernel is defined; a process interprets all kernels or none.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """One launch of a Triton kernel: its grid, its arguments by parameter name (constants included), warps and stages.

    max_registers: a bound per thread, so that more blocks fit on a multiprocessor; None leaves it to the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run launches in order on the current stream of ``device``; an empty grid is no launch."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if prod(launch.grid):
                launch.kernel[launch.grid](**launch.arguments, **launch.options)


def as_int32(word: int) -> int:
    """A 32-bit unsigned word as the signed integer of the same bits, so that a kernel sees one type whatever the value."""
    return word - (1 << 32) if word >= 1 << 31 else word


def ceil_div(value: int, divisor: int) -> int:
    """The least number of parts of size ``divisor`` that cover ``value``."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below ``value`` (1 for values below 1)."""
    return 1 << max(value - 1, 0).bit_length()
