"""What a CTM run on the digits has learned: distances by steps and gamma, the denoiser against its teacher, a picture.

The picture has gamma 0, 0.5 and 1 from left to right, 1, 2, 4 and 8 steps from top to bottom, a latent per column.

fastcm train ctm_digits --out runs/ctm && python -m benchmarks.ctm_digits runs/ctm --picture docs/ctm_digits.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.measuring.result_file import write_result
from fastcm.config import ComputeConfig
from fastcm.data.batch import Batch
from fastcm.data.dataset import load_resident
from fastcm.data.loader import Loader
from fastcm.data.sources import open_source
from fastcm.evaluate.digits import DigitEvaluator
from fastcm.io.bundle import load
from fastcm.io.images import save_side_by_side, to_uint8
from fastcm.model import Model
from fastcm.objectives import EDMObjective
from fastcm.objectives.base import noise_key
from fastcm.sampling import sample
from fastcm.train.build import compute_settings

STEPS = (1, 2, 4, 8)
GAMMAS = (0.0, 0.5, 1.0)
SETS = 4
COLUMNS = 10


def denoising_loss(model: Model, batch: Batch) -> float:
    """Mean EDM loss (arXiv 2206.00364, Eq. 2) at the training distribution of noise levels, same noise for every model."""
    objective = EDMObjective()
    sigma_N = objective.noise.sigma(torch.linspace(-2.5, 2.5, len(batch.index)))
    with torch.no_grad():
        return objective.loss_at(model, batch, sigma_N, noise_key(batch, 0)).loss_N.mean().item()


def main() -> None:
    """Print the table, write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with compute_settings(ComputeConfig(threads=1)):
        result = measure(options.run, options.picture)
    if options.json:
        write_result(options.json, f"ctm_digits {options.run.name}", {}, {**result, "environment": {"threads": 1}})


def measure(run: Path, picture: Path | None) -> dict[str, object]:
    """The figures of one run folder, printed as they come."""
    student, teacher = load(run / "distill.safetensors"), load(run / "pretrain.safetensors")
    evaluator = DigitEvaluator(load_resident(open_source("digits", "")))
    distances, sheets = {}, []
    real = evaluator.references()["real against real"]
    print(f"real against real {real:.3f}")
    for gamma in GAMMAS:
        rows = []
        for steps in STEPS:
            images = to_uint8(sample(student, SETS * evaluator.num, steps, gamma=gamma))
            distances[f"gamma {gamma:g}, {steps} steps"] = distance = evaluator.distance(images)
            rows.append(images[:COLUMNS])
            print(f"gamma {gamma:g}, {steps} steps: {distance:.3f}, {distance / real:.2f} times real against real")
        sheets.append(np.concatenate(rows))
    plain = load_resident(open_source("digits", "", labels=False))
    batch = Loader(plain, 1024, 0, torch.device("cpu")).batch(0)
    losses = {"student": denoising_loss(student, batch), "teacher": denoising_loss(teacher, batch)}
    print(f"denoising loss: student {losses['student']:.4f}, teacher {losses['teacher']:.4f}")
    if picture:
        save_side_by_side(picture, sheets, COLUMNS)
    return {"real against real": real, "distances": distances, "denoising loss": losses}


if __name__ == "__main__":
    main()
