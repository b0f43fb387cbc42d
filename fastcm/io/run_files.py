"""Where things lie in the folder of a run."""

from pathlib import Path

from fastcm.io.bundle import MODEL_FILE


class RunFiles:
    """The paths of a run.

    config.yaml       the resolved configuration
    run.json          its hash, the identity of the run (what must not change on resume), versions
    metrics.jsonl     one line per logging interval
    checkpoints/      everything needed to resume bit for bit
    ema_snapshots/    <phase>/<images>-std<width>.safetensors: power EMAs on the way, for ``fastcm ema``
    model.safetensors bundle of the current phase at its last snapshot; <phase>.safetensors of each finished one;
                      <phase>-ema.safetensors: what ``fastcm ema`` made
    evaluation.json   Frechet distances, where the run was evaluated; comparison.png: real images and samples
    samples/          picture grids at fixed latents; loss.png, report.html: what to look at
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.run = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.ema_snapshots = path / "ema_snapshots"
        self.bundle = path / MODEL_FILE
        self.samples = path / "samples"
        self.loss_curve = path / "loss.png"
        self.evaluation = path / "evaluation.json"
        self.comparison = path / "comparison.png"
        self.report = path / "report.html"

    def phase_bundle(self, phase: str) -> Path:
        """The bundle of a finished phase."""
        return self.path / f"{phase}.safetensors"

    def ema_bundle(self, phase: str) -> Path:
        """The bundle of averages reconstructed from the EMA snapshots of a phase."""
        return self.path / f"{phase}-ema.safetensors"
