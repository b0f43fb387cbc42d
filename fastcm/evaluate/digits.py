"""Evaluation of the embedded default: Frechet distances on the features of a small digit classifier.

The feature network is fitted in seconds with scikit-learn on the real digits themselves. The numbers rank models of
this data set; they are not FID.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from fastcm.config import DataConfig, load_config
from fastcm.data.dataset import ResidentDataset, load_resident
from fastcm.data.sources import open_source
from fastcm.errors import ConfigError
from fastcm.evaluate.frechet import frechet_distance
from fastcm.io.atomic import atomic_write
from fastcm.io.bundle import load, read_bundle, resolve_bundle
from fastcm.io.images import save_side_by_side, to_uint8
from fastcm.io.run_files import RunFiles
from fastcm.model import Model
from fastcm.random import Stream
from fastcm.sampling.generate import sample

NUM_FEATURES = 64
PICTURE_COLUMNS = 8
HEUN_STEPS = 18  # 35 network evaluations
NUM_SPLITS = 8  # of the real images into halves
NUM_SETS = 2  # of samples


class DigitFeatures:
    """The hidden layer of a classifier with one hidden layer of 64 units, fitted on real images and labels."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        classifier = MLPClassifier((NUM_FEATURES,), alpha=1e-3, tol=1e-3, max_iter=200, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the features need no fully converged classifier
            classifier.fit(_flatten(images_NHWC), labels_N)
        self._weight, self._bias = classifier.coefs_[0], classifier.intercepts_[0]

    def __call__(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, 64] of uint8 images."""
        return np.maximum(_flatten(images_NHWC) @ self._weight + self._bias, 0.0)


def _flatten(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.reshape(len(images_NHWC), -1) / 255.0


class DigitEvaluator:
    """Distances of sample sets to the real digits; every comparison is between two sets of 898 images.

    One split of the 1,797 images into halves may give twice the distance of another, so real against real is the mean
    over several splits, and samples are compared with all their halves.
    """

    def __init__(self, dataset: ResidentDataset) -> None:
        if dataset.labels is None or dataset.image_shape != (1, 8, 8):
            raise ConfigError(f"{dataset.name}: only the embedded digits have a built-in feature network to evaluate with")
        self.images = dataset.images.cpu().numpy()
        self.features = DigitFeatures(self.images, dataset.labels.cpu().numpy())
        self.num = len(self.images) // 2
        real, index = self.features(self.images), torch.arange(len(self.images))
        orders = (Stream(0, "evaluation halves").bits(index, draw=split).argsort(stable=True) for split in range(NUM_SPLITS))
        self.splits = [(real[order[: self.num]], real[order[self.num : 2 * self.num]]) for order in orders]

    def references(self) -> dict[str, float]:
        """What a perfect and what an untrained generator would get: half against half, and noise against real."""
        noise = Stream(0, "evaluation noise").image_normal(torch.arange(self.num), (1, 8, 8)) * 0.5
        real = float(np.mean([frechet_distance(*halves) for halves in self.splits]))
        return {"real against real": real, "untrained noise": self.distance(to_uint8(noise))}

    def distance(self, images_NHWC: np.ndarray) -> float:
        """Mean distance of uint8 images, in sets of 898, to the halves of the real ones."""
        sets = self.features(images_NHWC).reshape(-1, self.num, NUM_FEATURES)
        return float(np.mean([frechet_distance(one, half) for one in sets for halves in self.splits for half in halves]))

    def samples(self, model: Model, seed: int = 0) -> dict[str, np.ndarray]:
        """Sample sets to measure, by name: 35-evaluation Heun of a diffusion model, 2 and 1 steps of a few-step model."""
        if model.sampling.sampler == "heun":
            names = {f"{2 * HEUN_STEPS - 1}-evaluation Heun": HEUN_STEPS}
        elif model.sampling.sampler == "euler":
            names = {f"{model.sampling.steps} Euler steps": model.sampling.steps}
        else:
            names = {"2 steps": 2, "1 step": 1}
        return {name: to_uint8(sample(model, NUM_SETS * self.num, steps, seed)) for name, steps in names.items()}


def evaluate_path(path: Path, device: torch.device, seed: int = 0) -> dict[str, float]:
    """Distances of the reference sets, and of a bundle or of every finished phase of a run folder.

    For a run folder the result is also written to its ``evaluation.json``, and a picture of the real images and the
    samples side by side to ``comparison.png``. Raises ConfigError for models that were not
    trained on the digits, CheckpointError for files that are missing or damaged.
    """
    bundles = _bundles(path)
    for bundle in bundles:
        kind = read_bundle(bundle)[1].trained.get("data")
        if kind != DataConfig().kind:
            raise ConfigError(f"{bundle} was trained on '{kind}': only the embedded digits have a built-in feature network")
    evaluator, sets = DigitEvaluator(load_resident(open_source("digits", ""))), {}
    for bundle in bundles:
        for name, images in evaluator.samples(load(bundle, device=device), seed).items():
            sets[name if name not in sets else f"{name} ({bundle.stem})"] = images
    distances = evaluator.references() | {name: evaluator.distance(images) for name, images in sets.items()}
    if path.is_dir():
        files = RunFiles(path)
        atomic_write(files.evaluation, json.dumps(distances, indent=1))
        shown = [images[: PICTURE_COLUMNS**2] for images in (evaluator.images, *sets.values())]
        save_side_by_side(files.comparison, shown, PICTURE_COLUMNS)
    return distances


def _bundles(path: Path) -> list[Path]:
    """The bundles of a run folder's phases in their order, the unfinished one last; or the one bundle that is meant."""
    run = RunFiles(path)
    if not run.config.is_file():
        return [resolve_bundle(path)]
    files = [run.phase_bundle(phase) for phase in load_config(str(run.config)).phases]
    finished = [file for file in files if file.is_file()]
    return finished if len(finished) == len(files) else [*finished, resolve_bundle(path)]
