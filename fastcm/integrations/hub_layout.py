"""The Hugging Face layout of a model: config.json, model.safetensors and a model card, in plain JSON and safetensors.

config.json holds what the header of a bundle does, except for its list of weight averages: there is one set of weights,
whose name stands in ``trained``. The tensors are those of the network under its own names. No other package is needed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations.files import read_json, read_weights, write_json, write_weights
from fastcm.io.atomic import atomic_write
from fastcm.io.bundle import BundleHeader, load, model_from_header, read_bundle, resolve_bundle
from fastcm.io.tensors import copy_into
from fastcm.model import Model

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
FORMAT = 1
LIBRARY = "fastcm"
ONLY_NET = ("net",)  # the averages of a bundle that has none

_CARD = """---
library_name: {library}
pipeline_tag: unconditional-image-generation
tags:
- image-generation
- {sampler}
---

# {title}

Weights "{weights}" of a network of the {family} family with the {precond} preconditioner.

```python
import fastcm
from fastcm.integrations import HubModel

model = HubModel.from_pretrained("<this repository or folder>")
images = fastcm.sample(model, num=16, seed=0)  # [16, {shape}] in about [-1, 1]
```
"""


def export_hub(path: str | Path, folder: str | Path, *, ema: str = "") -> None:
    """Write a bundle, or that of a run folder, in the Hugging Face layout; ``ema`` chooses the weights as in ``load``.

    A model card that is there already is left alone.
    Raises CheckpointError for a bundle that is damaged or lacks these weights.
    """
    model, header = model_of_bundle(path, ema)
    write_hub(model, header, Path(folder))
    card = Path(folder) / CARD_FILE
    if not card.exists():
        atomic_write(card, model_card(header))


def import_hub(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Model, BundleHeader]:
    """The model in a folder of the Hugging Face layout and its header; dtype is the precision of the network's torso.

    Raises CheckpointError naming the file, and the key that is missing, unknown or damaged.
    """
    config, weights = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    return read_hub(config, weights, dtype)


def model_of_bundle(path: str | Path, ema: str = "") -> tuple[Model, BundleHeader]:
    """The model in a bundle or run folder with the weights that ``ema`` names, and the header of a bundle of these only.

    ``save_bundle(file, header, model.net.state_dict(), {})`` writes such a bundle.
    """
    file = resolve_bundle(Path(path))
    _, header = read_bundle(file)
    trained = {**header.trained, "weights": ema or header.emas[0]}
    return load(file, ema=ema), replace(header, emas=ONLY_NET, trained=trained)


def write_hub(model: Model, header: BundleHeader, folder: Path) -> None:
    """Write model.safetensors, then config.json."""
    content = {name: value for name, value in asdict(header).items() if name != "emas"}
    write_weights(folder / WEIGHTS_FILE, model.net.state_dict())
    write_json(folder / CONFIG_FILE, {"library_name": LIBRARY, **content, "format": FORMAT})


def read_hub(config_file: Path, weights_file: Path, dtype: torch.dtype) -> tuple[Model, BundleHeader]:
    """The model and header in these two files; errors as in ``import_hub``."""
    header = _header(read_json(config_file), config_file)
    try:
        model = model_from_header(header, dtype=dtype, origin=config_file)
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    copy_into(model.net.state_dict(), read_weights(weights_file), "", weights_file)
    return model.eval().requires_grad_(False), header


def model_card(header: BundleHeader) -> str:
    """The text of a model card: what the model is and how it is used."""
    channels, height, width = header.image_shape
    classes = f" of {header.label_dim} classes" if header.label_dim else ""
    return _CARD.format(
        library=LIBRARY,
        sampler=header.sampling.sampler,
        title=f"A generator of {height}x{width} images{classes}",
        weights=header.trained.get("weights", "net"),
        family=header.network.get("family"),
        precond=header.preconditioner.get("kind"),
        shape=f"{channels}, {height}, {width}",
    )


def _header(config: Mapping[str, Any], file: Path) -> BundleHeader:
    """The header in a config.json; every key of it must be understood."""
    if config.get("library_name") != LIBRARY:
        raise CheckpointError(f"{file}: library_name is {config.get('library_name')!r}, so this is no model of {LIBRARY}")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format is {config.get('format')!r}, this version of fastcm reads format {FORMAT}")
    try:
        header = TypeAdapter(BundleHeader).validate_python({**config, "emas": ONLY_NET})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        raise CheckpointError(f"{file}: damaged at {'.'.join(map(str, error['loc']))}: {error['msg']}") from None
    understood = {"library_name": LIBRARY, **json.loads(json.dumps(asdict(header)))}
    del understood["emas"]
    _check_understood(config, understood, file)
    return header


def _check_understood(found: Mapping[str, Any], understood: Mapping[str, Any], file: Path, prefix: str = "") -> None:
    for key, value in found.items():
        if key not in understood:
            raise CheckpointError(f"{file}: unknown key '{prefix}{key}'; it was written by another version or by hand")
        if isinstance(value, dict) and isinstance(understood[key], dict):
            _check_understood(value, understood[key], file, f"{prefix}{key}.")
        elif value != understood[key]:
            raise CheckpointError(
                f"{file}: '{prefix}{key}' is {value!r}, which cannot be; expected the like of {understood[key]!r}"
            )
