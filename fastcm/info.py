"""What ``fastcm info`` prints: this installation, or a model."""

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastcm import __version__, ops
from fastcm.config import shipped_configs
from fastcm.io.bundle import model_from_header, read_header, resolve_bundle


def describe_installation() -> dict[str, Any]:
    """Versions, devices, the backend that runs each kernel and why, the one that attention prefers, shipped configurations."""
    return {
        "fastcm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "devices": _devices(),
        "cpu_threads": torch.get_num_threads(),
        "kernels": {op: f"{choice.backend} ({choice.reason})" for op, choice in ops.choices().items()},
        "attention": ops.attention_table(),
        "configurations": shipped_configs(),
    }


def describe_model(path: Path) -> dict[str, Any]:
    """The header of a bundle, with the number of parameters; raises CheckpointError for a damaged file."""
    file = resolve_bundle(path)
    header = read_header(file)
    with torch.device("meta"):
        model = model_from_header(header, origin=file)
    return {"file": str(file), "num_parameters": sum(p.numel() for p in model.net.parameters()), **asdict(header)}


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu only"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
