"""What every result file says of itself: the command that repeats it, and where, when and of which commit it was measured."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastcm.bench.hardware import environment
from fastcm.bench.report import as_json
from fastcm.io.atomic import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def gpu_slug() -> str:
    """The name of the GPU as the names of result files begin."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def write_result(
    path: Path,
    module: str,
    options: Mapping[str, object],
    measured: Mapping[str, Any],
    device: torch.device | None = None,
) -> None:
    """Write what ``python -m benchmarks.MODULE`` with these options measured on a device, by default the CPU."""
    words = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
    command = " ".join([f"python -m benchmarks.{module}", *words])
    place = environment(device or torch.device("cpu"))
    # What was measured may know better where it ran, such as in a process of its own with other threads.
    place |= measured.get("environment", {})
    result = {"command": command, **options, **measured, "environment": place}
    atomic_write(path, as_json(result, indent=1) + "\n")
