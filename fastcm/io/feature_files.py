"""Weights of the frozen feature networks: a file, the Hugging Face Hub, or random numbers."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.tensors import copy_into, read_safetensors
from fastcm.io.torch_files import read_checkpoint
from fastcm.nn.features import FeatureNetwork, optional_package
from fastcm.nn.perceptual import LPIPS

DOWNLOAD, RANDOM = "download", "random"
VGG16 = "vgg16.tv_in1k"  # torchvision's weights under timm's name, and so LPIPS's
HUB_FILE = "model.safetensors"
LINEAR_FILE = "functional/image/lpips_models/vgg.pth"  # within torchmetrics: the linear weights of LPIPS 0.1
NESTED = ("state_dict", "model")


def load_lpips(
    source: str,
    *,
    linear: str = "",
    resize: int = 224,
    replace_pooling: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LPIPS:
    """The LPIPS distance with weights, see ``LPIPS``.

    source: a file of VGG16's weights by torchvision's names, "download" (from the Hugging Face Hub) or "random" (for trials,
    by the seed); linear: a file of the linear weights, by default the one that comes with torchmetrics.
    Raises CheckpointError for a missing, damaged or foreign file or a failed download, ConfigError for an empty source or a
    missing package.
    """
    lpips = LPIPS(resize=resize, replace_pooling=replace_pooling, dtype=dtype)
    if source == RANDOM:
        return lpips.init_weights(seed)
    path = _path(VGG16, source)
    features = {name: value for name, value in read_weights(path).items() if name.startswith("features.")}
    copy_into(lpips.weights(), features, "", path)
    path = Path(linear) if linear else _linear_file()
    copy_into(lpips.linear_weights(), read_weights(path), "", path)
    return lpips


def load_feature_network(
    name: str, source: str, *, size: int = 224, dtype: torch.dtype = torch.float32, seed: int = 0
) -> FeatureNetwork:
    """A feature network of timm with weights, see ``FeatureNetwork``.

    source: a file of the network's weights by timm's names, "download" (from the Hugging Face Hub) or "random" (for trials,
    by the seed). Raises CheckpointError for a missing, damaged or foreign file or a failed download, ConfigError for an
    empty source, an unknown network or a missing package.
    """
    network = FeatureNetwork(name, size=size, dtype=dtype)
    if source == RANDOM:
        return network.init_weights(seed)
    path = _path(name, source)
    used = {key: value for key, value in read_weights(path).items() if key not in network.unused}
    copy_into(network.weights(), used, "", path)
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a state dict that torch saved, alone or under "state_dict" or "model".

    Nothing is unpickled into objects. Raises CheckpointError naming the file and what it is instead.
    """
    if path.suffix != ".safetensors":
        return _state_dict(read_checkpoint(path), path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected weights of a feature network")
    return read_safetensors(path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping):
        state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if state:
            return state
    raise CheckpointError(f"{path}: holds no weights by name; expected a state dict, alone or under {' or '.join(NESTED)}")


def _path(name: str, source: str) -> Path:
    if not source:
        raise ConfigError(f"weights of the feature network {name} are needed: give a file, '{DOWNLOAD}' or, to try, '{RANDOM}'")
    return _fetch(name) if source == DOWNLOAD else Path(source)


def _fetch(name: str) -> Path:
    """The weights of a network of timm from the Hub, or from its cache where they are there already."""
    hub, timm = optional_package("huggingface_hub"), optional_package("timm")
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    if not repository:
        raise ConfigError(f"timm names no repository with weights of '{name}'; give a file of them instead of '{DOWNLOAD}'")
    try:
        return Path(hub.hf_hub_download(repository, HUB_FILE))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"weights of {name}: {HUB_FILE} of {repository} could not be fetched from the Hub ({reason}); fetch it by hand "
            "and give its path"
        ) from error


def _linear_file() -> Path:
    found = find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "the linear weights of LPIPS come with the package torchmetrics: pip install fastcm[features], or give a file"
        )
    return Path(found.submodule_search_locations[0]) / LINEAR_FILE
