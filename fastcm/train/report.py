"""The loss curve and ``report.html``: one self-contained page to open and look at."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from fastcm.io.atomic import atomic_write
from fastcm.train.run_folder import RunFolder

MAX_GRIDS_PER_KIND = 6


def save_loss_curve(path: Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Plot for each phase the loss against images seen, and beside it the losses by noise level."""
    phases = list(dict.fromkeys(entry["phase"] for entry in metrics))
    figure = Figure(figsize=(10, 3.2 * len(phases)), layout="constrained")
    for phase, (total, levels) in zip(phases, figure.subplots(len(phases), 2, squeeze=False), strict=True):
        entries = [entry for entry in metrics if entry["phase"] == phase and entry["loss"] is not None]
        images = [entry["phase_images"] for entry in entries]
        total.plot(images, [entry["loss"] for entry in entries])
        total.set(title=f"{phase}: loss", xlabel="images", yscale="log")
        for bucket in dict.fromkeys(name for entry in entries for name in entry["loss_by_sigma"]):
            levels.plot(images, [entry["loss_by_sigma"].get(bucket, float("nan")) for entry in entries], label=bucket)
        levels.set(title=f"{phase}: loss by noise level sigma", xlabel="images", yscale="log")
        if entries:
            levels.legend(fontsize="x-small", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(path, buffer.getvalue())


def write_report(run: RunFolder) -> None:
    """Write loss.png and report.html from what the run folder holds."""
    metrics = run.read_metrics()
    if metrics:
        save_loss_curve(run.loss_curve, metrics)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastcm.train", "."), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        name=run.path.name,
        facts=json.loads(run.run.read_text()),
        config=run.config.read_text(),
        distances=_distances(run.evaluation),
        comparison=_data_uri(run.comparison) if run.comparison.is_file() else "",
        loss_curve=_data_uri(run.loss_curve) if metrics else "",
        grids=_grids(run.samples),
        last={entry["phase"]: entry for entry in metrics},
    )
    atomic_write(run.report, page)


def _grids(samples: Path) -> dict[str, list[tuple[str, str]]]:
    """Per kind of grid (phase and sampler) up to six (images seen, data URI), first and last included."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(file for file in samples.glob("*.png") if file.is_file()):
        kind, _, _ = path.stem.rpartition("-")
        kinds.setdefault(kind, []).append(path)
    return {
        kind: [(path.stem.rpartition("-")[2].lstrip("0") or "0", _data_uri(path)) for path in _spread(paths)]
        for kind, paths in kinds.items()
    }


def _distances(path: Path) -> dict[str, float]:
    """What an evaluation left behind; nothing where it is missing or damaged, for it can be made again."""
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _spread(paths: list[Path]) -> list[Path]:
    count = min(len(paths), MAX_GRIDS_PER_KIND)
    return [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
