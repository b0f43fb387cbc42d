"""The training loop: phases in order, each a sequence of steps with pictures, checkpoints and metrics in between."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.config import Config
from fastcm.data.dataset import ResidentDataset
from fastcm.errors import ConfigError, FastcmError, Interrupted
from fastcm.io.images import save_grid
from fastcm.sampling.generate import sample
from fastcm.train.build import check_objectives, compute_settings, open_dataset, resolve_network, select_device
from fastcm.train.checkpoint import load_newest, save_checkpoint
from fastcm.train.ema_snapshots import SnapshotWriter, drop_later_snapshots
from fastcm.train.phase import Phase
from fastcm.train.preflight import check_phases
from fastcm.train.report import write_report
from fastcm.train.run_folder import RunFolder, identity_changes, run_identity
from fastcm.train.signals import StopFlag, stop_flag
from fastcm.train.telemetry import Telemetry

log = logging.getLogger("fastcm")


@dataclass(frozen=True)
class Saved:
    """Where a checkpoint left off: its phase, the images seen in it, the global index of the phase's first image."""

    phase: str
    images: int
    first_image: int
    identity: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def train(config: Config, out: Path) -> RunFolder:
    """Run every phase of a configuration in the folder ``out``, or resume what is there; returns the run folder.

    Raises ConfigError, DataError or CheckpointError for what a user can mend, Interrupted after a signal once the state
    is saved.
    """
    check_objectives(config)
    run, config = RunFolder(out), resolve_network(config)
    device = select_device(config.compute.device)
    with run.locked(), compute_settings(config.compute), stop_flag() as stop:
        data = open_dataset(config.data, device)
        facts = {"kind": config.data.kind, "num_images": len(data), "fingerprint": data.fingerprint}
        identity = run_identity(config, facts)
        saved = load_saved(run, identity)
        identity = saved.identity if saved else identity  # files that were needed at the beginning may be gone
        check_phases(config, data, saved.phase if saved else next(iter(config.phases)), resumed=saved is not None)
        run.claim(config, identity, facts)
        Trainer(config, run, data, device, stop, identity).run(saved)
        write_report(run)
    return run


def load_saved(run: RunFolder, identity: Mapping[str, Any]) -> Saved | None:
    """The newest checkpoint of a run folder, None where there is none.

    Raises ConfigError listing every part of the identity that differs from the run that saved it.
    """
    found = load_newest(run.checkpoints)
    if found is None:
        return None
    tensors, state = found
    changes = identity_changes(state["identity"], identity)
    if changes:
        advice = "train into another folder, or undo the change"
        raise ConfigError(f"{run.path} holds a run with another identity: {'; '.join(changes)}; {advice}")
    log.info("resuming %s at %d images", state["phase"], state["images"])
    return Saved(state["phase"], state["images"], state["first_image"], state["identity"], tensors)


class Trainer:
    """Carries one run from its first (or last saved) image to its last."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        data: ResidentDataset,
        device: torch.device,
        stop: StopFlag,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.run_folder, self.data, self.device = config, run, data, device
        self.stop, self.identity = stop, identity

    def run(self, saved: Saved | None) -> None:
        """Train the phases that are not finished yet."""
        self.run_folder.rewind_metrics(saved.first_image + saved.images if saved else 0)
        names = list(self.config.phases)
        names = names[names.index(saved.phase) if saved else 0 :]
        for name in names:
            seen = saved.images if saved and name == saved.phase else 0
            drop_later_snapshots(self.run_folder.ema_snapshots / name, seen)
        weights, first_image = None, 0
        for name in names:
            phase = Phase(self.config, name, self.data, self.device, saved.first_image if saved else first_image)
            if saved:
                phase.load_tensors(saved.tensors, saved.images, self.run_folder.checkpoints)
                saved = None
            else:
                phase.start(weights)
            self.run_phase(phase)
            weights, first_image = phase.averaged_weights(), phase.first_image + phase.images
            del phase
            gc.collect()  # a phase refers to itself, and the memory of its graphs is needed for the next one

    def run_phase(self, phase: Phase) -> None:
        """Train one phase to its end, with a snapshot at every interval and at the end."""
        every = self.config.telemetry
        telemetry = Telemetry(self.run_folder, phase.name, phase.images, phase.settings.duration_images)
        ema_snapshots = SnapshotWriter(self.run_folder.ema_snapshots / phase.name, phase, self.identity)
        while not phase.finished:
            before = phase.images
            phase.step()
            telemetry.advance(phase.images - before)
            ema_snapshots.advance(before)
            if phase.finished or _passes(before, phase.images, every.log_images):
                values = self._values(phase)
                telemetry.write(phase.first_image + phase.images, phase.images, values)
                _require_progress(phase, values)
            if phase.finished or _passes(before, phase.images, every.snapshot_images):
                self.snapshot(phase)
                telemetry.resume_clock()
            elif self.stop:
                self.save(phase)
            if self.stop and not phase.finished:
                telemetry.close()
                raise Interrupted(
                    f"stopped by {self.stop.reason} at {phase.images} images of {phase.name}, saved; run it again to resume"
                )
        telemetry.close()
        phase.save_bundle(self.run_folder.phase_bundle(phase.name))

    def _values(self, phase: Phase) -> dict[str, Any]:
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        values = {**phase.meter.read(), "learning_rate": phase.learning_rate, **phase.objective.schedule(phase.images)}
        values |= {} if phase.adversary is None else phase.adversary.read()
        values |= {} if phase.loss_scale is None else {"loss_scale": phase.loss_scale.scale.item()}
        return values | ({} if memory is None else {"peak_memory_bytes": memory})

    def snapshot(self, phase: Phase) -> None:
        """Picture grids, bundle, loss curve and report, then the checkpoint: where it exists, so do they."""
        self.draw(phase)
        phase.save_bundle(self.run_folder.bundle)
        write_report(self.run_folder)
        self.save(phase)

    def save(self, phase: Phase) -> None:
        """Write a checkpoint from which the run continues bit for bit."""
        state = {"phase": phase.name, "images": phase.images, "first_image": phase.first_image, "identity": self.identity}
        keep = self.config.telemetry.keep_checkpoints
        save_checkpoint(self.run_folder.checkpoints, phase.first_image + phase.images, phase.tensors(), state, keep)

    def draw(self, phase: Phase) -> None:
        """Write grids of samples at fixed latents: 1 and 2 steps, and Heun while a diffusion model is trained."""
        settings, model = self.config.telemetry, phase.sampling_model()
        few = "trajectory" if model.sampling.sampler == "trajectory" else "consistency"
        grids = {"1step": (few, 1), "2step": (few, 2)}
        if model.sampling.sampler in ("heun", "euler"):
            grids[model.sampling.sampler] = (model.sampling.sampler, model.sampling.steps or settings.heun_steps)
        for kind, (sampler, steps) in grids.items():
            images = sample(model, settings.grid_size**2, steps, self.config.seed, sampler=sampler)
            save_grid(self.run_folder.samples / f"{phase.name}-{kind}-{phase.images:012d}.png", images, settings.grid_size)


def _require_progress(phase: Phase, values: Mapping[str, Any]) -> None:
    # A loss scale above 1 is still on its way down to where gradients are finite, but not beyond the end of the phase.
    searching = values.get("loss_scale", 1.0) > 1.0 and not (phase.finished and phase.optimizer.num_steps.item() == 0)
    # None of either: the discriminator had the whole interval.
    if values["loss"] is None and values["skipped_steps"] and not searching:
        raise FastcmError(
            f"training diverged: no finite step in the {values['skipped_steps']} before {phase.images} images of {phase.name}; "
            "the checkpoints are untouched: lower the learning rate and run it again"
        )


def _passes(before: int, after: int, interval: int) -> bool:
    return before // interval != after // interval
