"""The networks of a phase (student, target, teacher), and the weights they begin with."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastcm.config import FeaturesConfig, PhaseConfig
from fastcm.errors import CheckpointError
from fastcm.io.bundle import BundleHeader, load, model_from_header, read_bundle, resolve_bundle
from fastcm.io.feature_files import load_feature_network, load_lpips
from fastcm.io.tensors import copy_into
from fastcm.model import Model
from fastcm.nn.diff_augment import DiffAugment
from fastcm.nn.layers import store_convolutions
from fastcm.nn.perceptual import LPIPS, FeatureDistance
from fastcm.nn.projection import ProjectedFeatures
from fastcm.train.optimizer import WeightAverage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What a network may give up when it is trained on: an absent augmentation label contributes nothing, and the log
# variance belongs to the loss it was trained with.
DROPPABLE = ("map_augment.", "logvar_")
# What it may get besides: a second time, which begins as the network says.
SECOND_TIME = ("map_layer0_s.", "map_layer1_s.", ".affine_s.")


def target_model(student: Model, average: WeightAverage) -> Model:
    """A model whose parameters are the memory of a moving average of the student's; it has the student's own buffers."""
    target = copy.deepcopy(student).requires_grad_(False)
    for name, parameter in target.net.named_parameters():
        parameter.data = average.averages[name]
    for mine, theirs in zip(target.modules(), student.modules(), strict=True):
        mine._buffers.update(theirs._buffers)
    return target


def teacher_source(settings: PhaseConfig) -> str:
    """Where a phase's teacher comes from: "previous", "fresh" (there is none) or the path of a bundle."""
    return settings.teacher or settings.init


def teacher_model(settings: PhaseConfig, before: BundleHeader | None, dtype: torch.dtype, device: torch.device) -> Model:
    """The frozen teacher of a phase, its convolutions in ``dtype``, with its weights where they come from a bundle.

    ``before`` is the header of the previous phase, whose averaged weights the teacher is given later where it is "previous".
    Raises CheckpointError for a bundle that is missing or damaged.
    """
    source = teacher_source(settings)
    if source == "previous":
        teacher = model_from_header(before, dtype=dtype, origin=Path("previous phase")).to(device).eval().requires_grad_(False)
    else:
        teacher = load(source, device=device, dtype=dtype)
    store_convolutions(teacher.net, dtype)
    return teacher


def perceptual_distance(distance: str, config: FeaturesConfig, seed: int, device: torch.device) -> LPIPS | FeatureDistance:
    """The frozen networks that objectives measure the distance "lpips" or "features" with.

    Raises ConfigError or CheckpointError where they have no weights.
    """
    if distance == "features":
        networks = projected_features(config.distance, config, seed)
        for network in networks.values():
            network.init_projection(seed, "distance_projection")
        return FeatureDistance(list(networks.values()), seed, DiffAugment() if config.distance_augment else None).to(device)
    pooling = {"resize": config.lpips_resize, "replace_pooling": config.lpips_replace_pooling}
    lpips = load_lpips(config.lpips, linear=config.lpips_linear, **pooling, dtype=DTYPES[config.dtype], seed=seed)
    return lpips.to(device)


def projected_features(
    sources: Mapping[str, str], config: FeaturesConfig, seed: int, scale_kernel: Literal[1, 3] = 1
) -> dict[str, ProjectedFeatures]:
    """Feature networks with weights from these sources and projections that are not drawn yet, by the networks' names."""
    options = {"size": config.size, "dtype": DTYPES[config.dtype], "seed": seed}
    networks = {name: load_feature_network(name, source, **options) for name, source in sources.items()}
    return {name: ProjectedFeatures(network, scale_kernel=scale_kernel) for name, network in networks.items()}


def copy_weights(net: torch.nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Fill parameters and buffers in, leaving out what the weights have more of a kind that can be given up.

    A second time that the weights lack stays as it is. Raises CheckpointError for any other difference.
    """
    wanted = net.state_dict()
    kept = {name: value for name, value in weights.items() if name in wanted or not name.startswith(DROPPABLE)}
    if not any(part in name for name in kept for part in SECOND_TIME):
        wanted = {name: value for name, value in wanted.items() if not any(part in name for part in SECOND_TIME)}
    copy_into(wanted, kept, "", origin)


def bundle_weights(path: Path) -> dict[str, Tensor]:
    """The weights a bundle is sampled with: those of its first average, and the buffers."""
    tensors, header = read_bundle(resolve_bundle(path))
    weights = {name.removeprefix("net/"): value for name, value in tensors.items() if name.startswith("net/")}
    averaged = f"ema/{header.emas[0]}/"
    weights |= {name.removeprefix(averaged): value for name, value in tensors.items() if name.startswith(averaged)}
    if not weights:
        raise CheckpointError(f"{path}: the bundle holds no weights")
    return weights
