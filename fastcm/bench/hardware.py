"""What a number was measured on, and the data-sheet rates that floors are computed from where nothing was measured."""

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastcm import __version__

PACKAGES = ("torch", "triton", "xformers", "apex", "numpy")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,driver_version"


class DataSheet(NamedTuple):
    """Peak rates as the vendor states them, per second: memory, dense 16-bit matrix units, plain fp32."""

    bytes: float
    half_flops: float
    fp32_flops: float

    def flops(self, dtype: torch.dtype) -> float:
        """The arithmetic rate for a dtype; fp32 products do not use the matrix units here (no TF32)."""
        return self.fp32_flops if dtype == torch.float32 else self.half_flops


DATA_SHEETS = {
    "A100": DataSheet(2.039e12, 312e12, 19.5e12),  # SXM, 80 GB
    "H100": DataSheet(3.35e12, 989e12, 67e12),  # SXM
    "H200": DataSheet(4.8e12, 989e12, 67e12),
}


def environment(device: torch.device) -> dict[str, Any]:
    """Device, clocks, versions, commit and time, to stand beside every number."""
    return {
        "device": device_name(device),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fastcm": __version__,
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "commit": source_commit(Path(__file__).parents[2]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "state": _clocks(),
    }


def _clocks() -> dict[str, str]:
    """Clocks, power and temperature as ``nvidia-smi`` reads them; nothing is set. Empty where it does not run."""
    text = _output(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]) if shutil.which("nvidia-smi") else None
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    return dict(zip(CLOCKS.split(","), values, strict=False))


def source_commit(root: Path) -> str | None:
    """The commit of a source checkout, with "+" where what can be measured differs from it; None for an installed package.

    Documents and result files do not count, so that several results can be measured in a row.
    """
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    measured = ["fastcm", "kernels", "configs", "benchmarks", "setup.py", ":!benchmarks/results", ":!*.md"]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--", *measured])
    return commit and commit + ("+" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
