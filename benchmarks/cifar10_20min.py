"""A real training of at most 20 minutes and what came out of it: distances, pictures, nearest images, times, in one file.

    python -m benchmarks.cifar10_20min --data CIFAR10 [--fd-tool TOOL.py] [--run FOLDER] [--json FILE] [--smoke] [KEY=VALUE]...

Trains the configuration cifar10_20min with ``fastcm train``, draws 10,000 images each with ``fastcm sample``: by Heun's method
(35 evaluations), in 1 and in 2 steps. CIFAR10 is whatever ``data.path`` may be, such as an .npz of images. TOOL is called as
``TOOL.py SAMPLES.npz REFERENCE.npz`` with uint8 images [N, 32, 32, 3] and prints a distance as its last word; where it has a
function ``features(images)``, nearest images are looked for in that space too. The same command goes on where it stopped.
--smoke tries all of it on the CPU with a tiny network and few images: its numbers mean nothing.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measuring.result_file import RESULTS, ROOT, gpu_slug
from fastcm.bench.hardware import environment
from fastcm.bench.report import as_json
from fastcm.config import load_config
from fastcm.data.sources import open_source
from fastcm.io.atomic import atomic_write
from fastcm.io.images import save_side_by_side
from fastcm.train.run_folder import RunFolder

CONFIG = "cifar10_20min"
# Name of a set of samples: the phase whose bundle they come from, and the option --steps.
SETS = {"Heun, 35 evaluations": ("pretrain", 18), "2 steps": ("tune", 2), "1 step": ("tune", 1)}
COLUMNS = 8  # of pictures
NEIGHBOURS = 16  # samples whose nearest training images are looked for
CURVE_POINTS = 60
SMOKE = (
    *("network.model_channels=16", "network.channel_mult=[1,1]", "network.num_blocks=1", "network.attn_resolutions=[]"),
    *(f"phases.{phase}.{value}" for phase in ("pretrain", "tune") for value in ("duration_images=128", "batch_size=32")),
    *("compute.dtype=float32", "telemetry.log_images=64", "telemetry.snapshot_images=64", "telemetry.grid_size=2"),
    "telemetry.heun_steps=2",
)

Result = dict[str, Any]


class Job(NamedTuple):
    """Where everything is, and how many images are drawn."""

    data: Path
    fd_tool: Path | None
    run: RunFolder
    pictures: Path
    num: int
    overrides: tuple[str, ...]

    def samples(self, name: str) -> Path:
        """The images of a set."""
        return self.run.path / f"{name.replace(' ', '-').replace(',', '')}.npz"


def train(job: Job) -> Result:
    """Train by the user's command; the times of an interrupted run are added up by ``run_stages``."""
    fastcm("train", CONFIG, f"data.path={job.data}", *job.overrides, "--out", str(job.run.path))
    shutil.copy(job.run.loss_curve, job.pictures / f"{CONFIG}_loss.png")
    return {"curves": {phase: curve(job.run, phase) for phase in load_config(CONFIG).phases}}


def curve(run: RunFolder, phase: str) -> list[tuple[int, float]]:
    """(images, loss) along a phase, thinned out."""
    points = [(entry["phase_images"], entry["loss"]) for entry in run.read_metrics() if entry["phase"] == phase]
    return points[:: max(1, len(points) // CURVE_POINTS)]


def draw(job: Job, name: str) -> Result:
    """One set of samples."""
    phase, steps = SETS[name]
    bundle = job.run.phase_bundle(phase)
    fastcm("sample", str(bundle), *("--steps", str(steps)), *("--num", str(job.num)), *("--out", str(job.samples(name))))
    return {"images": job.num}


def fastcm(*words: str) -> None:
    """The command line as a user has it."""
    subprocess.run([sys.executable, "-m", "fastcm", *words], check=True)


def measure(job: Job) -> Result:
    """Distances of the samples to the training images, and of two halves of those to one another for scale."""
    if job.fd_tool is None:
        return {"distances": {}}
    real = training_images(job)
    reference, halves = job.run.path / "reference.npz", [job.run.path / f"half{i}.npz" for i in (0, 1)]
    np.savez(reference, images=real)
    for i, half in enumerate(halves):
        np.savez(half, images=real[i::2])
    pairs = {name: (job.samples(name), reference) for name in SETS} | {"real against real (halves)": tuple(halves)}
    return {"tool": job.fd_tool.name, "distances": {name: distance(job.fd_tool, *pair) for name, pair in pairs.items()}}


def distance(tool: Path, samples: Path, reference: Path) -> float:
    """What the tool prints last; raises RuntimeError where that is no number."""
    done = subprocess.run(
        [sys.executable, str(tool), str(samples), str(reference)], capture_output=True, text=True, check=False
    )
    words = done.stdout.split()
    if done.returncode or not words or not re.fullmatch(r"[-+.\deE]+", words[-1]):
        raise RuntimeError(f"{tool} ended with {done.returncode} and printed no number: {(done.stdout + done.stderr)[-500:]}")
    return float(words[-1])


def training_images(job: Job) -> np.ndarray:
    """All training images, uint8 NHWC."""
    source = open_source("cifar10", job.data, labels=False)
    return np.stack([source.read(i) for i in range(len(source))])


def show(job: Job) -> Result:
    """Real images and samples side by side; samples above their nearest training images, by pixels and by features."""
    real = training_images(job)
    sets = {name: np.load(job.samples(name))["images"] for name in SETS}
    shown = [images[: COLUMNS**2] for images in (real, *sets.values())]
    save_side_by_side(job.pictures / f"{CONFIG}.png", shown, COLUMNS)
    spaces: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": as_points}
    if features := features_of(job.fd_tool):
        spaces["features"] = features
    found, rows = {}, []
    samples = sets["1 step"][:NEIGHBOURS]
    rows.append(samples)
    for space, embed in spaces.items():
        index, distances = nearest(embed(samples), embed(real))
        rows.append(real[index])
        found[space] = {"index": index.tolist(), "distance": distances.tolist()}
    save_side_by_side(job.pictures / f"{CONFIG}_nearest.png", [np.concatenate(rows)], len(samples))
    return {"nearest": found}


def as_points(images_NHWC: np.ndarray) -> np.ndarray:
    """Images as vectors of pixels from 0 to 1."""
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32) / 255


def features_of(tool: Path | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """The tool's own feature space, where it offers one."""
    if tool is None:
        return None
    spec = importlib.util.spec_from_file_location(tool.stem, tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "features", None)


def nearest(points_ND: np.ndarray, others_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of and Euclidean distance to the nearest of the others."""
    squares_NM = np.stack([((others_MD - point) ** 2).sum(1) for point in points_ND])
    index = squares_NM.argmin(1)
    return index, np.sqrt(squares_NM[np.arange(len(index)), index])


def stages_of(job: Job) -> dict[str, Callable[[], Result]]:
    """Everything that is done, in order."""
    draws = {f"sample {name}": (lambda name=name: draw(job, name)) for name in SETS}
    return {"train": lambda: train(job), **draws, "measure": lambda: measure(job), "show": lambda: show(job)}


def run_stages(stages: dict[str, Callable[[], Result]], result: Result, save: Callable[[], None]) -> None:
    """Do the stages that are not done; each has its time, which goes on where it was interrupted."""
    for name, work in stages.items():
        entry = result["stages"].setdefault(name, {"seconds": 0.0, "done": False})
        if entry["done"]:
            continue
        start = time.perf_counter()
        try:
            entry |= {**work(), "done": True}
        finally:
            entry["seconds"] += time.perf_counter() - start
            result["stages"][name] = entry
            save()
        print(f"{CONFIG}: {name}: {entry['seconds']:.1f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fd-tool", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs") / CONFIG)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num", type=int, default=10_000, help="images of each set")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device here; --smoke tries all of it on the CPU")
    slug = "smoke-cpu" if options.smoke else gpu_slug()
    path = options.json or RESULTS / f"{slug}-cifar10-20min-{datetime.now(UTC):%Y-%m-%d}.json"
    overrides = (*(SMOKE if options.smoke else ()), *options.overrides)
    pictures = path.parent if options.smoke else ROOT / "docs"
    job = Job(options.data, options.fd_tool, RunFolder(options.run), pictures, options.num, overrides)
    device = torch.device("cpu" if options.smoke else "cuda")
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"smoke": options.smoke, "stages": {}}
    if result["smoke"] != options.smoke:
        parser.error(f"{path} is a result of another kind: move it away or choose another --json")
    result |= {"environment": environment(device), "config": CONFIG, "overrides": list(overrides), "num": options.num}
    run_stages(stages_of(job), result, lambda: atomic_write(path, as_json(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
