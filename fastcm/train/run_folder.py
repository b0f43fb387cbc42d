"""The folder of one run: what is in it, whose it is, and whether a configuration may continue it."""

import fcntl
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import fastcm
from fastcm.config import Config, PhaseConfig
from fastcm.errors import CheckpointError
from fastcm.io.atomic import TEMPORARY, atomic_write
from fastcm.io.feature_files import DOWNLOAD, RANDOM
from fastcm.io.fingerprint import GONE, fingerprint
from fastcm.io.run_files import RunFiles


class RunFolder(RunFiles):
    """The folder of a run that is being trained, and its bookkeeping."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and remove the unfinished files of one that was killed.

        Raises CheckpointError if another run is writing to the folder, or nobody can.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.path}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{self.path}: another process is training into this folder") from None
            for folder in (self.path, self.samples, *self.ema_snapshots.glob("*")):
                for leftover in folder.glob(TEMPORARY):
                    leftover.unlink()
            yield

    def claim(self, config: Config, identity: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write config.yaml and run.json."""
        atomic_write(self.config, f"# configuration hash {config.hash}\n{config.to_yaml()}")
        facts = {
            "config_hash": config.hash,
            "identity": identity,
            "data": dict(data),
            "versions": {"fastcm": fastcm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        atomic_write(self.run, json.dumps(facts, indent=1))

    def read_identity(self) -> dict[str, Any]:
        """The identity of the run as run.json tells it; raises CheckpointError where there is none to read."""
        try:
            identity = json.loads(self.run.read_bytes())["identity"]
            if not isinstance(identity["phases"], dict):
                raise TypeError("no phases")
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "give the folder of a run; the run's 'fastcm train' command writes the file anew"
            raise CheckpointError(f"{self.run}: cannot be read ({error}); {advice}") from None
        return identity

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a line torn by a kill, or that is not ours, is left out."""
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.is_file() else []
        return [entry for entry in map(_parse_line, lines) if entry is not None]

    def rewind_metrics(self, images: int) -> None:
        """Drop what was logged after the checkpoint that is being resumed from."""
        kept = [entry for entry in self.read_metrics() if entry["images"] <= images]
        atomic_write(self.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; raises CheckpointError where the file system refuses."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.metrics}: {error.strerror or error}; checkpoints are untouched"
            ) from error


def run_identity(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a run that may not change on resume: seed, dtype, network, data, and what each phase learns from what.

    Images and files of weights count by their content, not by their place; feature networks where a phase uses them.
    """
    return {
        "seed": config.seed,
        "compute": {"dtype": config.compute.dtype},
        "data": {**config.data.model_dump(mode="json", exclude={"path", "download"}), "fingerprint": data["fingerprint"]},
        "network": config.network.model_dump(mode="json"),
        "features": _features_identity(config),
        "phases": {name: _phase_identity(phase) for name, phase in config.phases.items()},
    }


def _phase_identity(phase: PhaseConfig) -> dict[str, Any]:
    fixed = {"objective", "batch_size", "microbatch_size", "dropout", "dropout_max_resolution", "augment", "emas"}
    words = ("", "previous", "fresh")
    return {
        **phase.model_dump(mode="json", include=fixed),
        "init": fingerprint(phase.init, words),
        "teacher": fingerprint(phase.teacher, words),
        "optimizer": phase.optimizer.model_dump(mode="json", include={"kind", "betas", "eps"}),
    }


def _features_identity(config: Config) -> dict[str, Any]:
    """The settings of those feature networks that a phase uses."""
    objectives = [phase.objective for phase in config.phases.values()]
    distances = {getattr(objective, "distance", "") for objective in objectives}
    used: set[str] = set()
    if "lpips" in distances:
        used |= {"lpips", "lpips_linear", "lpips_resize", "lpips_replace_pooling", "dtype"}
    if "features" in distances:
        used |= {"distance", "distance_augment", "size", "dtype"}
    if any(getattr(objective, "gan", None) for objective in objectives):
        used |= {"discriminator", "size", "dtype"}
    found = config.features.model_dump(mode="json", include=used)
    words = ("", DOWNLOAD, RANDOM)
    for key in used & {"lpips", "lpips_linear"}:
        found[key] = fingerprint(found[key], words)
    for key in used & {"distance", "discriminator"}:
        found[key] = {name: fingerprint(source, words) for name, source in found[key].items()}
    return found


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any value of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def identity_changes(saved: Any, now: Any, path: str = "") -> list[str]:
    """One line for each value that differs between two nested dictionaries: "key.path was X, is Y".

    A file that is gone differs from nothing: where it is still needed, that is another error.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted(saved.keys() | now.keys())
        return [line for key in keys for line in identity_changes(saved.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if now in (saved, GONE) else [f"{path} was {saved!r}, is {now!r}"]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
        return entry if entry.keys() >= {"phase", "images", "phase_images", "loss", "loss_by_sigma"} else None
    except (ValueError, AttributeError):
        return None
