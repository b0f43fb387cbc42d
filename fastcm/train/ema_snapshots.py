"""Snapshots of power-function EMAs: a small file for each average and moment, to build others from (``ema_reconstruction``).

``ema_snapshots/<phase>/000000064000-std0050.safetensors`` holds ``ema/<parameter>`` in fp16, and fp32 where a value does not
fit, ``buffer/<name>`` as the network has them, and a ``SnapshotHeader``. A file says all that a bundle of it needs.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.io.bundle import BundleHeader
from fastcm.io.tensors import read_tensors, write_tensors
from fastcm.train.phase import Phase
from fastcm.train.run_folder import identity_digest

log = logging.getLogger("fastcm")

FORMAT = 1


@dataclass(frozen=True)
class SnapshotHeader:
    """What a snapshot says of itself; phase, images and configuration hash are in ``bundle.trained``."""

    std: float
    identity: str  # digest of the identity of the run
    sha256: str  # of the tensors
    bundle: BundleHeader
    format: int = FORMAT


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file, as its name describes it."""

    path: Path
    images: int
    std: float


def std_name(std: float) -> str:
    """The width 0.05 as "std0050": its decimals, at least three of them, without the point."""
    text = f"{Decimal(repr(std)):f}"
    return "std" + text.ljust(5, "0").replace(".", "")


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a phase by images, then width; other files are left alone."""
    found = ((path, re.fullmatch(r"(\d{12})-std0(\d{3,})\.safetensors", path.name)) for path in folder.glob("*"))
    snapshots = [Snapshot(path, int(match[1]), float(f"0.{match[2]}")) for path, match in found if match]
    return sorted(snapshots, key=lambda snapshot: (snapshot.images, snapshot.std))


def drop_later_snapshots(folder: Path, images: int) -> None:
    """Delete what a run wrote after the point that it now resumes from: it may take another way from there."""
    for snapshot in list_snapshots(folder):
        if snapshot.images > images:
            snapshot.path.unlink()


def read_snapshot(snapshot: Snapshot, identity: str) -> tuple[dict[str, Tensor], SnapshotHeader]:
    """Tensors and header of a snapshot of the run whose identity has the digest ``identity``.

    Raises CheckpointError for a file that is damaged, is not what its name says, or comes from another run.
    """
    tensors, fields = read_tensors(snapshot.path)
    if fields.get("format") != FORMAT:
        raise CheckpointError(
            f"{snapshot.path}: snapshot format {fields.get('format')!r}, this version of fastcm reads format {FORMAT}"
        )
    try:
        header = TypeAdapter(SnapshotHeader).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{snapshot.path}: damaged header: {first['loc']}: {first['msg']}") from None
    if header.sha256 != _digest(tensors):
        raise CheckpointError(f"{snapshot.path}: damaged: its content does not match its SHA-256")
    trained = header.bundle.trained
    found = (trained.get("phase"), trained.get("images"), header.std)
    if found != (snapshot.path.parent.name, snapshot.images, snapshot.std):
        raise CheckpointError(f"{snapshot.path}: holds phase, images and std {found}, not what its place and name say")
    if header.identity != identity:
        raise CheckpointError(
            f"{snapshot.path}: snapshot of another run (identity {header.identity}, this run has {identity}); move it away"
        )
    return tensors, header


class SnapshotWriter:
    """Writes the snapshots of a phase at its interval and at its end; averages of equal width are one.

    fp16 costs 2 bytes a parameter and its rounding reaches the result. On digits, with widths 0.05 and 0.1 stored 24 times,
    the weights differ from those of an average that was followed by 2e-4 for widths 0.08 to 0.2 and by 1e-3 for 0.03, where
    large coefficients amplify it (fp32: 2e-6 to 2e-4, and 4e-5); from the stored averages they differ by 8e-3 to 7e-2.
    """

    def __init__(self, folder: Path, phase: Phase, identity: Mapping[str, Any]) -> None:
        self.folder, self.phase, self.identity = folder, phase, identity_digest(identity)
        self.interval = phase.settings.ema_snapshot_images
        emas = phase.settings.emas.items()
        self.averages = {ema.std: phase.averages[name].averages for name, ema in emas if ema.kind == "power"}
        if self.interval and not phase.finished:
            self._announce()

    def _announce(self) -> None:
        size = self.phase.settings.batch_size
        steps = -(-self.phase.settings.duration_images // size)
        moments = min(steps, (steps - 1) * size // self.interval + 1)
        parameters = sum(value.numel() for average in self.averages.values() for value in average.values())
        count, megabytes = f"{moments} x {len(self.averages)}", 2 * parameters * moments / 1e6
        log.info("%s: %s EMA snapshots will take %.1f MB in %s", self.phase.name, count, megabytes, self.folder)

    def advance(self, before: int) -> None:
        """Write what is due after the step that began at ``before`` images."""
        passed = self.interval and before // self.interval != self.phase.images // self.interval
        if passed or (self.interval and self.phase.finished):
            for std, average in self.averages.items():
                self._write(std, average)

    def _write(self, std: float, average: Mapping[str, Tensor]) -> None:
        state, images = self.phase.model.net.state_dict(), self.phase.images
        tensors = {f"ema/{name}": _compact(value).cpu().contiguous() for name, value in average.items()}
        tensors |= {f"buffer/{name}": value.cpu().contiguous() for name, value in state.items() if name not in average}
        header = SnapshotHeader(std, self.identity, _digest(tensors), self.phase.header.after(images))
        write_tensors(self.folder / f"{images:012d}-{std_name(std)}.safetensors", tensors, asdict(header))


def _compact(value: Tensor) -> Tensor:
    half = value.detach().half()
    return half if half.isfinite().all() else value.detach()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
