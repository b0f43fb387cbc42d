"""What can be known before the first step: every phase's network is possible and finds the weights it starts from."""

from pathlib import Path
from typing import Any

import torch

from fastcm.config import Config
from fastcm.data.dataset import ResidentDataset
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.bundle import BundleHeader, model_from_header, read_bundle
from fastcm.train.phase import phase_header


def check_phases(config: Config, data: ResidentDataset, first: str) -> None:
    """Check the phases from ``first`` on: a wrong path or a misfit is found now, not after hours of pretraining.

    Raises ConfigError for a network or an order of phases that cannot work, CheckpointError for a bundle that is missing,
    damaged or of another architecture.
    """
    names = list(config.phases)
    for number, name in enumerate(names):
        header, init = phase_header(config, name, data), config.phases[name].init
        with torch.device("meta"):
            model_from_header(header, origin=Path(name))
        if number < names.index(first) or init == "fresh" or (init == "previous" and number == 0):
            continue
        if init == "previous":
            before = phase_header(config, names[number - 1], data)
            if _noise_input(before) != _noise_input(header):
                raise ConfigError(
                    f"phases.{name}: its network sees noise levels as {_noise_input(header)}, the one of {names[number - 1]} "
                    f"as {_noise_input(before)}; use equal variants and sigma_data, or init: fresh"
                )
        else:
            _check_bundle(Path(init), header)


def _check_bundle(path: Path, needed: BundleHeader) -> None:
    _, found = read_bundle(path)
    pairs = {f"network.{key}": (found.network.get(key), value) for key, value in needed.network.items()}
    pairs |= {
        "image_shape": (found.image_shape, needed.image_shape),
        "label_dim": (found.label_dim, needed.label_dim),
        "augment_dim": (found.augment_dim if needed.augment_dim else 0, needed.augment_dim),
        "preconditioner": (_noise_input(found), _noise_input(needed)),
    }
    misfits = [f"{key} is {has}, this run needs {needs}" for key, (has, needs) in pairs.items() if has != needs]
    if misfits:
        raise CheckpointError(f"{path}: {'; '.join(misfits)}; the file belongs to another architecture")


def _noise_input(header: BundleHeader) -> dict[str, Any]:
    """The part of the preconditioner that decides what the network is fed: all but how its output is used."""
    kind = header.preconditioner["kind"].removesuffix("_boundary")
    constants = header.preconditioner if kind != "edm" else {"sigma_data": header.preconditioner["sigma_data"]}
    return {**constants, "kind": kind}
