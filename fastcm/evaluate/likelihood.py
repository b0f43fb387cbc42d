"""Bits per dimension of a model on a data set, as ``fastcm likelihood`` prints them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fastcm.data.order import Order
from fastcm.data.sources import Source, open_source
from fastcm.errors import ConfigError, DataError
from fastcm.io.atomic import atomic_write
from fastcm.io.bundle import load
from fastcm.model import Model
from fastcm.sampling.likelihood import Likelihood, bits_per_dim

DIGIT_LEVELS, BYTE_LEVELS = 17, 256


@dataclass(frozen=True, eq=False)
class MeasuredLikelihood:
    """The likelihood of some images of a set: the set's name and size, and the numbers of the images in it."""

    name: str
    num_images: int
    index_N: Int64[Tensor, " N"]
    likelihood: Likelihood

    def lines(self) -> list[str]:
        """What a person reads."""
        found, settings = self.likelihood, self.likelihood.settings
        noise = {"uniform": "uniform noise", "truncated_normal": "truncated normal noise", "none": "no noise"}[
            settings.dequantize
        ]
        probes = "the exact trace" if settings.probe == "exact" else f"{settings.probes} {settings.probe} probe(s)"
        return [
            f"bits/dim    {found.mean:.4f}",
            f"  95 % over images: {_interval(found.interval)}; over probes: {_interval(found.probe_interval)}",
            f"images      {len(self.index_N)} of {self.num_images} of {self.name}",
            f"dequantised {noise}, {settings.levels} levels: {found.offset_bits:+.3f} bits/dim; residual {settings.residual}",
            f"ODE         sigma {settings.sigma_min:g} to {settings.sigma_max:g}, rtol {settings.rtol:g}, "
            f"atol {settings.atol:g}: {found.mean_evaluations:g} evaluations (NFE), each with {probes}",
        ]

    def write(self, file: Path) -> None:
        """Write everything, with each image's number and bits per dimension, as JSON."""
        found = self.likelihood
        content: dict[str, Any] = {
            "data": self.name,
            "bits_per_dim": found.mean,
            "standard_error": found.standard_error,
            "probe_standard_error": found.probe_standard_error,
            "interval_95": found.interval,
            "probe_interval_95": found.probe_interval,
            "mean_evaluations": found.mean_evaluations,
            "offset_bits": found.offset_bits,
            "settings": asdict(found.settings),
            "images": self.index_N.tolist(),
            "image_bits_per_dim": found.bpd.tolist(),
        }
        atomic_write(file, json.dumps(content, indent=1))


def measure_likelihood(
    bundle: Path,
    kind: str = "digits",
    path: Path | None = None,
    *,
    num: int = 100,
    seed: int = 0,
    ema: str = "",
    device: torch.device | str = "cpu",
    levels: int | None = None,
    **options: Any,
) -> MeasuredLikelihood:
    """Bits per dimension of ``num`` images of a set, drawn by the seed, or of all if there are fewer.

    bundle: a bundle or a run folder. kind, path: as for ``open_source``. levels: values that a pixel can have, by default 17
    for the digits and 256 for all others. options: of ``bits_per_dim``. A class-conditional model is given the images' classes.
    An image's noise depends on its number in the set and the seed only.
    Raises CheckpointError, ConfigError and DataError for a model, arguments or images that cannot be used.
    """
    if kind == "digits" and path is not None:
        raise ConfigError(f"{path}: the digits need no data; name the format of the data by --kind, such as cifar10")
    model, source = load(bundle, ema=ema, device=device), open_source(kind, path)
    if source.image_shape != model.image_shape:
        raise DataError(f"{source.name}: images are {source.image_shape} (C, H, W), {bundle} is a model of {model.image_shape}")
    index_N = Order(len(source), seed).permutation(0)[:num]
    pixels = np.stack([source.read(i) for i in index_N.tolist()])
    images_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    levels = levels or (DIGIT_LEVELS if kind == "digits" else BYTE_LEVELS)
    labels = _labels(model, source, index_N)
    found = bits_per_dim(model, images_NCHW, labels=labels, index=index_N, seed=seed, levels=levels, **options)
    return MeasuredLikelihood(source.name, len(source), index_N, found)


def _labels(model: Model, source: Source, index_N: Tensor) -> Tensor | None:
    if not model.label_dim:
        return None
    if source.labels is None or source.label_dim != model.label_dim:
        raise DataError(f"{source.name} has {source.label_dim} classes, the model {model.label_dim}: its labels are needed")
    return torch.from_numpy(source.labels)[index_N]


def _interval(interval: tuple[float, float] | None) -> str:
    return "unknown (needs two)" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
