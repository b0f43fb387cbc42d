"""Training checkpoints: folders that verify or are ignored. This module knows nothing of models.

``checkpoints/000000256000/`` holds ``state.safetensors`` and ``manifest.json`` with its size and SHA-256. The folder is
written under a temporary name and renamed last; the oldest are deleted only after the new one is in place.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.io.atomic import sync
from fastcm.io.fingerprint import sha256
from fastcm.io.tensors import read_tensors, write_tensors

log = logging.getLogger("fastcm")

STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"


def save_checkpoint(folder: Path, images: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write one checkpoint named by the images seen, then delete all but the newest ``keep``.

    Raises CheckpointError where writing fails; earlier checkpoints stay as they are.
    """
    final = folder / f"{images:012d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        write_tensors(temporary / STATE_FILE, tensors, state)
        _write_manifest(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error.strerror or error}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # A later folder can only be a damaged one that was skipped on resume; it must not push the new one out.
    for old in [path for path in list_checkpoints(folder) if path.name <= final.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(path for path in folder.glob("*") if re.fullmatch(r"\d{12}", path.name) and path.is_dir())


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint that verifies; None where there is none at all.

    A damaged checkpoint is skipped with one warning. Raises CheckpointError if all are damaged.
    """
    rejected = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            return read_tensors(path / STATE_FILE)
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
            rejected.append(str(path))
    if rejected:
        raise CheckpointError(f"every checkpoint is damaged: {', '.join(rejected)}; delete them to start anew")
    return None


def verify_checkpoint(path: Path) -> None:
    """Check size and SHA-256 of every file against the manifest; raises CheckpointError naming the file."""
    try:
        files = json.loads((path / MANIFEST_FILE).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST_FILE}: unreadable ({error})") from None
    for name, (num_bytes, digest) in expected.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != num_bytes:
            raise CheckpointError(f"{file}: {'missing' if found is None else f'{found} bytes'}, expected {num_bytes} bytes")
        if sha256(file) != digest:
            raise CheckpointError(f"{file}: content does not match its SHA-256")


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.glob("*.safetensors")}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"format": 1, "files": files}, indent=1))
    sync(manifest)
    sync(folder)
