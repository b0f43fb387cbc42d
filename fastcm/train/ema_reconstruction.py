"""``fastcm ema``: weight averages of any length from the EMA snapshots of a run (arXiv 2312.02696, section 3.2)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.bundle import BundleHeader, save_bundle
from fastcm.train.ema_snapshots import Snapshot, list_snapshots, read_snapshot, std_name
from fastcm.train.posthoc_ema import kernel_mismatch, posthoc_coefficients
from fastcm.train.run_folder import RunFolder, identity_digest

log = logging.getLogger("fastcm")

MAX_MISMATCH = 0.1  # above it the reconstruction is announced as a poor one
NEGLIGIBLE = 2.0**-26  # a coefficient below it changes nothing in fp32


@dataclass(frozen=True)
class Reconstruction:
    """What was built: the averages of widths ``stds`` after ``images`` images of ``phase``, from ``used``, into ``path``."""

    phase: str
    images: int
    stds: tuple[float, ...]
    mismatch: tuple[float, ...]  # relative L2 distance of each averaging kernel to the one asked for
    used: tuple[Snapshot, ...]
    path: Path

    def describe(self) -> Iterator[str]:
        """What a user wants to know of it, line by line."""
        yield f"{self.phase} at {self.images} images, from {len(self.used)} snapshots"
        for std in sorted({snapshot.std for snapshot in self.used}):
            moments = [snapshot.images for snapshot in self.used if snapshot.std == std]
            yield f"  {len(moments)} of std {std:g}, {moments[0]} to {moments[-1]} images"
        for std, mismatch in zip(self.stds, self.mismatch, strict=True):
            yield f"{std_name(std)}: kernel mismatch {100 * mismatch:.2g} %"
        yield f"model: {self.path}"


def reconstruct(
    run: RunFolder,
    stds: tuple[float, ...],
    *,
    images: int | None = None,
    phase: str = "",
    out: Path | None = None,
    skip_damaged: bool = False,
) -> Reconstruction:
    """Write a bundle with power-function EMAs of the widths ``stds``, named by ``std_name``, built from a run's snapshots.

    Arguments: images, those seen in the phase at the end of the average (default: at the last snapshot); phase (default: the
    last one with snapshots); out (default: ``run.ema_bundle``); skip_damaged, leave out what cannot be used instead of
    stopping. The bundle's raw weights are those of its first average. Snapshots are read one at a time.
    Raises ConfigError for a width, phase or moment that cannot be had, CheckpointError for missing or damaged files.
    """
    for std in stds:
        if not 0 < std < 0.28:
            raise ConfigError(f"std {std:g}: the relative width of an average lies between 0 and 0.28")
    stds = tuple(dict.fromkeys(stds))
    identity = run.read_identity()
    phase = _select_phase(run, list(identity["phases"]), phase)
    digest = identity_digest(identity)
    stored = list_snapshots(run.ema_snapshots / phase)
    if skip_damaged:
        stored = [snapshot for snapshot in stored if _is_usable(snapshot, digest)]
    stored, images = _select_moments(stored, images, run.ema_snapshots / phase)
    coefficients_ST, mismatch = _fit(stored, stds, images)
    used = [number for number, row_T in enumerate(coefficients_ST) if np.abs(row_T).max() > NEGLIGIBLE]
    result = Reconstruction(
        phase, images, stds, mismatch, tuple(stored[number] for number in used), out or run.ema_bundle(phase)
    )
    _combine(result, coefficients_ST[used], digest)
    return result


def _select_phase(run: RunFolder, phases: list[str], wanted: str) -> str:
    stored = [name for name in phases if list_snapshots(run.ema_snapshots / name)]
    if not stored:
        advice = "train with phases.<phase>.ema_snapshot_images above 0"
        raise CheckpointError(f"{run.ema_snapshots}: no EMA snapshots of this run; {advice}")
    if wanted and wanted not in stored:
        raise ConfigError(f"phase '{wanted}' has no EMA snapshots in {run.path}; there are some of {', '.join(stored)}")
    return wanted or stored[-1]


def _is_usable(snapshot: Snapshot, identity: str) -> bool:
    try:
        read_snapshot(snapshot, identity)
    except CheckpointError as error:
        log.warning("snapshot left out: %s", error)
        return False
    return True


def _select_moments(stored: list[Snapshot], images: int | None, folder: Path) -> tuple[list[Snapshot], int]:
    """The snapshots up to the first one at or after ``images``; later ones would get no weight."""
    if not stored:
        raise CheckpointError(f"{folder}: none of the EMA snapshots can be used")
    last = stored[-1].images
    images = last if images is None else images
    if not 0 < images <= last:
        raise ConfigError(f"{images} images: the EMA snapshots in {folder} reach from {stored[0].images} to {last}")
    end = min(snapshot.images for snapshot in stored if snapshot.images >= images)
    return [snapshot for snapshot in stored if snapshot.images <= end], images


def _fit(stored: list[Snapshot], stds: tuple[float, ...], images: int) -> tuple[Float64[np.ndarray, "S T"], tuple[float, ...]]:
    sources = (np.array([float(snapshot.images) for snapshot in stored]), np.array([snapshot.std for snapshot in stored]))
    targets = (np.full(len(stds), float(images)), np.array(stds))
    coefficients_ST = posthoc_coefficients(*sources, *targets)
    mismatch = tuple(kernel_mismatch(coefficients_ST, *sources, *targets).tolist())
    for std, value in zip(stds, mismatch, strict=True):
        if value > MAX_MISMATCH:
            log.warning(
                "%s at %d images: its averaging kernel misses the one asked for by %.0f %%; %s",
                std_name(std), images, 100 * value, "these snapshots are too few or too far from that width",
            )  # fmt: skip
    return coefficients_ST, mismatch


def _combine(plan: Reconstruction, coefficients_ST: Float64[np.ndarray, "S T"], identity: str) -> None:
    """Sum the used snapshots up in fp32, one file at a time, and write the bundle."""
    names = tuple(map(std_name, plan.stds))
    averages: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for snapshot, row_T in zip(plan.used, coefficients_ST, strict=True):
        tensors, header = read_snapshot(snapshot, identity)
        for key, value in tensors.items():
            kind, _, parameter = key.partition("/")
            for name, coefficient in zip(names, row_T.tolist(), strict=True):
                if kind == "ema":
                    total = averages[name].setdefault(parameter, torch.zeros(value.shape))
                    total.add_(value.float(), alpha=coefficient)
    raw = {name: value.clone() for name, value in averages[names[0]].items()}
    raw |= {key.removeprefix("buffer/"): value for key, value in tensors.items() if key.startswith("buffer/")}
    save_bundle(plan.path, _bundle_header(header.bundle, plan, names), raw, averages)


def _bundle_header(snapshot: BundleHeader, plan: Reconstruction, names: tuple[str, ...]) -> BundleHeader:
    posthoc = {"snapshots": len(plan.used), "mismatch": dict(zip(names, plan.mismatch, strict=True))}
    return replace(snapshot, emas=names, trained={**snapshot.trained, "images": plan.images, "posthoc_ema": posthoc})
