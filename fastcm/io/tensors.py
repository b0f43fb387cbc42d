"""safetensors files, with a JSON header of ours or as other projects have them, read back with errors that name the file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.io.atomic import atomic_path

HEADER_KEY = "fastcm"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header atomically; see ``write_safetensors``."""
    write_safetensors(path, tensors, {HEADER_KEY: json.dumps(header)})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically; conv weights are stored in the usual (row-major) order."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (on the CPU) and the header of a file written by ``write_tensors``.

    Raises CheckpointError for a missing, truncated or foreign file.
    """
    header = read_json_header(path)
    return read_safetensors(path), header


def read_json_header(path: Path) -> dict[str, Any]:
    """The header alone; raises CheckpointError as ``read_tensors`` does."""
    try:
        return dict(json.loads(read_metadata(path)[HEADER_KEY]))
    except (KeyError, ValueError, TypeError):
        found = f"a safetensors file, but not one that fastcm wrote (no '{HEADER_KEY}' header)"
        raise CheckpointError(f"{path}: {found}; 'fastcm convert' makes bundles of other projects' files") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of anybody's, on the CPU; raises CheckpointError for a missing or damaged one."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the head of a file of anybody's; raises CheckpointError for a missing or damaged one."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        hint = "; 'fastcm convert' makes bundles of other projects' pickles" if _is_pickle(path) else ""
        raise CheckpointError(f"{path}: damaged or cut short, or not a safetensors file: {error}{hint}") from None


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle does, or as the archives of pickles that torch saves."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"))


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, origin: Path) -> None:
    """Copy ``tensors[prefix + name]`` into every target; keys and shapes must match exactly, floats may differ in their width.

    Raises CheckpointError naming the first missing, extra or wrongly shaped key, or one that has integers in place of floats.
    """
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for name in targets.keys() ^ found.keys():
        state = "missing" if name in targets else "not part of this network"
        raise CheckpointError(f"{origin}: '{prefix}{name}' is {state}; the file belongs to another architecture")
    for name, target in targets.items():
        if target.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)}, this network needs {tuple(target.shape)}"
            raise CheckpointError(f"{origin}: '{prefix}{name}' has shape {shapes}; the file belongs to another architecture")
        if target.is_floating_point() != found[name].is_floating_point():
            dtypes = f"{found[name].dtype}, this network needs {target.dtype}".replace("torch.", "")
            raise CheckpointError(f"{origin}: '{prefix}{name}' is of {dtypes}; give the weights as they were trained")
    for name, target in targets.items():
        target.copy_(found[name])
