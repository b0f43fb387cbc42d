"""What can be known before the first step: every phase's network is possible and finds the weights it starts from."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastcm.config import BundleNetworkConfig, Config, CTMObjectiveConfig, FeaturesConfig, PhaseConfig
from fastcm.data.dataset import ResidentDataset
from fastcm.data.sources import cifar10
from fastcm.errors import CheckpointError, ConfigError, DataError
from fastcm.io.bundle import BundleHeader, model_from_header, read_header, resolve_bundle
from fastcm.nn.features import check_feature_network
from fastcm.objectives import ProgressiveDistillation
from fastcm.train.adversary import Adversary
from fastcm.train.build import build_objective, check_objectives, open_images, resolve_network
from fastcm.train.networks import perceptual_distance, teacher_source
from fastcm.train.phase import phase_header

log = logging.getLogger("fastcm")

CPU = torch.device("cpu")


def check_config(config: Config) -> None:
    """What a dry run can tell of a run: what is wrong with its configuration, and with the files that are there.

    Images are not read, and they and bundles may come later. Raises what ``check_phases`` raises, and DataError for images
    that cannot be the configured ones, as ``open_images`` does.
    """
    check_objectives(config)
    for name, settings in config.phases.items():
        _check_features(name, settings, config.features)
    first = next(iter(config.phases))
    if isinstance(config.network, BundleNetworkConfig) and _comes_later(config.phases[first].init):
        return
    data = _expected_images(config)
    if data is not None:
        check_phases(resolve_network(config), data, first, dry=True)


def _comes_later(source: str) -> bool:
    """Whether weights are those of a bundle that is not there yet."""
    return source not in ("previous", "fresh") and not Path(source).exists()


def _expected_images(config: Config) -> ResidentDataset | None:
    """A data set without images of the shape that the configured one has; None where that cannot be known yet."""
    if config.data.kind == "cifar10":  # as they are wherever they lie, and its archive would have to be read
        (channels, height, width), label_dim = cifar10.IMAGE_SHAPE, cifar10.NUM_CLASSES
        if config.data.resolution not in (0, height):
            raise DataError(f"CIFAR-10: images are {height}x{width}, but data.resolution is {config.data.resolution}")
    elif config.data.path and not Path(config.data.path).exists():
        return None
    else:
        source = open_images(config.data)
        (channels, height, width), label_dim = source.image_shape, source.label_dim
    device = "cpu" if config.compute.device == "cpu" else "meta"  # where the run will compute may have a GPU
    images = torch.empty((0, height, width, channels), dtype=torch.uint8, device=device)
    return ResidentDataset(images, None, label_dim, "", config.data.kind)


def check_phases(config: Config, data: ResidentDataset, first: str, resumed: bool = False, dry: bool = False) -> None:
    """Check the phases from ``first`` on: a wrong path or a misfit is found now, not after hours of pretraining.

    resumed: the first one goes on from a checkpoint, which holds its weights, so where they came from no longer matters.
    dry: bundles may come later, and feature networks are not built.
    Raises ConfigError for a network or an order of phases that cannot work, CheckpointError for a bundle that is missing,
    damaged or of another architecture.
    """
    if config.compute.cuda_graph == "on" and data.images.device.type == "cpu":
        raise ConfigError("compute.cuda_graph is 'on', but a CPU has no graphs: set it to 'auto' or 'off'")
    names = list(config.phases)
    for number, name in enumerate(names):
        header, settings = phase_header(config, name, data), config.phases[name]
        with torch.device("meta"):
            model_from_header(header, origin=Path(name))
        before = phase_header(config, names[number - 1], data) if number else None
        _check_needs(name, settings, header)
        _check_features(name, settings, config.features)
        if number >= names.index(first) and not dry:
            _build_frozen(name, settings, config, header)
        begins = number > names.index(first) or (number == names.index(first) and not resumed)
        if begins and not (dry and _comes_later(settings.init)):
            _check_start(name, settings, header, before)
        if number >= names.index(first) and not (dry and _comes_later(teacher_source(settings))):
            _check_teacher(name, settings, header, before)


def _check_needs(name: str, settings: PhaseConfig, header: BundleHeader) -> None:
    """The network is what the objective asks for, and progressive distillation gets to its end."""
    _check_last_stage(name, settings)
    gan = getattr(settings.objective, "gan", None)
    if isinstance(settings.objective, CTMObjectiveConfig):
        if not header.network.get("second_time"):
            raise ConfigError(f"phases.{name}: CTM jumps between two times; set network.second_time to true")
        for option in ("dropout", "augment"):
            if getattr(settings, option):
                raise ConfigError(f"phases.{name}.{option} is {getattr(settings, option)}, but CTM has none; set it to 0")
        if header.network.get("overrides", {}).get("decoder") == "skip":
            raise ConfigError(f"phases.{name}: CTM needs a network with a single last layer, not decoder 'skip'")
        if gan is not None and gan.conditional and not header.label_dim:
            raise ConfigError(f"phases.{name}: gan.conditional needs classes; set data.conditional to true")


def _check_features(name: str, settings: PhaseConfig, features: FeaturesConfig) -> None:
    """There are such feature networks as the objective asks for, and weights for them."""
    gan = getattr(settings.objective, "gan", None)
    if gan is not None:
        _check_networks(name, "discriminator", features.discriminator, features.size)
    distance = build_objective(settings.objective).perceptual
    if distance == "features":
        _check_networks(name, "distance", features.distance, features.size)
    if distance == "lpips":
        if not features.lpips:
            raise ConfigError(
                f"phases.{name}: the distance lpips needs weights; set features.lpips to a file of VGG16 or to 'download', "
                "or take another distance"
            )
        _check_sources({"lpips": features.lpips}, "features")


def _check_last_stage(name: str, settings: PhaseConfig) -> None:
    objective = build_objective(settings.objective)
    if isinstance(objective, ProgressiveDistillation):
        reached = objective.sampling_steps(settings.duration_images - 1)
        if reached > objective.end_steps:
            log.warning(
                "phases.%s ends at %d steps, not at end_steps %d: %d images hold too few stages of %d",
                *(name, reached, objective.end_steps, settings.duration_images, objective.stage_images),
            )


def _check_networks(phase: str, use: str, sources: Mapping[str, str], size: int) -> None:
    """There are such feature networks for images of this size, and weights for them."""
    for name, source in sources.items():
        if not source:
            raise ConfigError(
                f"phases.{phase}: the feature network {name} of its {use} needs weights; set features.{use}.{name} to a file "
                "or to 'download'"
            )
        check_feature_network(name, size)
    _check_sources(sources, f"features.{use}")


def _check_sources(sources: Mapping[str, str], section: str) -> None:
    for name, source in sources.items():
        if source not in ("download", "random") and not Path(source).is_file():
            raise CheckpointError(f"{section}.{name}: there is no file '{source}'")


def _build_frozen(name: str, settings: PhaseConfig, config: Config, header: BundleHeader) -> None:
    """Build distance and discriminator once, and let them go: files of other networks are found now, not after a phase."""
    gan, distance = getattr(settings.objective, "gan", None), build_objective(settings.objective).perceptual
    for use, build in (
        ("distance", lambda: distance and perceptual_distance(distance, config.features, config.seed, CPU)),
        ("discriminator", lambda: gan and Adversary(gan, config.features, header.label_dim, config.seed, 0, CPU)),
    ):
        try:
            build()
        except (ConfigError, CheckpointError) as error:
            section = "lpips" if (use, distance) == ("distance", "lpips") else use
            raise type(error)(f"phases.{name}, features.{section} (features.size {config.features.size}): {error}") from None


def _check_start(name: str, settings: PhaseConfig, header: BundleHeader, before: BundleHeader | None) -> None:
    if settings.init == "fresh" or (settings.init == "previous" and before is None):
        return
    if settings.init != "previous":
        _check_bundle(Path(settings.init), header)
    elif _noise_input(before) != _noise_input(header):
        raise ConfigError(
            f"phases.{name}: its network sees noise levels as {_noise_input(header)}, the one of the phase before "
            f"as {_noise_input(before)}; use equal variants and sigma_data, or init: fresh"
        )


def _check_teacher(name: str, settings: PhaseConfig, header: BundleHeader, before: BundleHeader | None) -> None:
    """The teacher is there, makes the same images of the same classes, and is like the student where that replaces it."""
    objective, source = build_objective(settings.objective), teacher_source(settings)
    if not objective.needs_teacher:
        if settings.teacher:
            raise ConfigError(f"phases.{name}.teacher is '{settings.teacher}', but the objective has no use for a teacher")
        return
    if source == "fresh" or (source == "previous" and before is None):
        raise ConfigError(
            f"phases.{name}: its objective distils a teacher, and there is none; set its teacher or init to a bundle, "
            "or put a phase that trains one before it"
        )
    found = before if source == "previous" else read_header(resolve_bundle(Path(source)))
    if found.sampling.sampler == "consistency":
        raise ConfigError(f"phases.{name}: its teacher ({source}) is a consistency model; distil a diffusion model")
    if settings.augment:
        raise ConfigError(
            f"phases.{name}: augment is {settings.augment}, but a teacher is not told of augmentation; set it to 0"
        )
    pairs = {"image_shape": (found.image_shape, header.image_shape), "label_dim": (found.label_dim, header.label_dim)}
    if isinstance(objective, ProgressiveDistillation):  # whose student takes the teacher's place
        pairs |= _architecture(found, header) | {
            "network.second_time": tuple(part.network.get("second_time", False) for part in (found, header)),
            "preconditioner": (found.preconditioner, header.preconditioner),
        }
    _require_equal(f"the teacher of phases.{name} ({source})", pairs)


def _check_bundle(path: Path, needed: BundleHeader) -> None:
    found = read_header(resolve_bundle(path))
    pairs = _architecture(found, needed)
    pairs |= {
        "image_shape": (found.image_shape, needed.image_shape),
        "label_dim": (found.label_dim, needed.label_dim),
        "augment_dim": (found.augment_dim if needed.augment_dim else 0, needed.augment_dim),
        "preconditioner": (_noise_input(found), _noise_input(needed)),
    }
    _require_equal(str(path), pairs)


def _architecture(found: BundleHeader, needed: BundleHeader) -> dict[str, tuple[Any, Any]]:
    """What each network has for every key of its configuration.

    A log variance that is not needed may be given up, and a second time that is not there yet may be added; how that begins
    is of no account.
    """
    pairs = {f"network.{key}": (found.network.get(key), value) for key, value in needed.network.items()}
    pairs.pop("network.second_time_init", None)
    if not needed.network.get("logvar_channels"):
        pairs.pop("network.logvar_channels", None)
    if needed.network.get("second_time") and not found.network.get("second_time"):
        pairs.pop("network.second_time")
    return pairs


def _require_equal(what: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    misfits = [f"{key} is {has}, this run needs {needs}" for key, (has, needs) in pairs.items() if has != needs]
    if misfits:
        raise CheckpointError(f"{what}: {'; '.join(misfits)}; the file belongs to another architecture")


def _noise_input(header: BundleHeader) -> dict[str, Any]:
    """The part of the preconditioner that decides what the network is fed: all but how its output is used."""
    kind = header.preconditioner["kind"].removesuffix("_boundary")
    constants = header.preconditioner if kind != "edm" else {"sigma_data": header.preconditioner["sigma_data"]}
    return {**constants, "kind": kind}
