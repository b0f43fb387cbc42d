"""Frozen feature networks of timm and the distance of two lists of feature maps."""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.errors import ConfigError
from fastcm.nn.init import fans
from fastcm.random import Stream

NUM_MAPS = 4
EPS = 1e-8
Maps = list[Float[Tensor, "N _ _ _"]]


class MapShape(NamedTuple):
    """A feature map of square images: its channels, its side in pixels, and pixels of the image per pixel of the map."""

    channels: int
    side: int
    reduction: int


def optional_package(name: str) -> ModuleType:
    """Import a package of the extra ``features``; raises ConfigError that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"feature networks need the package {name}: pip install fastcm[features] ({error})") from error


class Frozen(nn.Module):
    """A module that is never trained: always in eval mode, no parameter takes a gradient."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch norms keep their statistics, nothing is dropped out."""
        return super().train(False)

    def freeze(self) -> Self:
        """Take away the gradients of all parameters and put convolutions into channels_last memory."""
        return self.train(False).requires_grad_(False).to(memory_format=torch.channels_last)


class FeatureNetwork(Frozen):
    """Four feature maps of a frozen network of timm, finest first, of images in [-1, 1].

    Images are repeated to three colours if they are gray, resized bilinearly to ``size`` and normalised as the network was
    trained (timm's ``mean`` and ``std``, of images in [0, 1]). Convolutional networks give the last four resolutions, vision
    transformers the blocks at 1/4, 2/4, 3/4 and 4/4 of their depth without class tokens, all at one resolution.
    arXiv 2111.01007, section 3.2; arXiv 2202.00273, section 3.2.

    Arguments: name, of a timm model; size, the side of what the network sees; dtype of its weights and arithmetic. Weights are
    all NaN before ``weights()`` are filled or ``init_weights``. Raises ConfigError for a name that timm does not have, one
    that gives no feature maps, or a missing timm.
    """

    def __init__(self, name: str, *, size: int = 224, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name, self.size = name, size
        self.model = _skeleton(name, size)
        known = set(self.model.state_dict())
        self.indices, self.shapes = _choose_maps(self.model, name, size)
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.unused = frozenset(known - set(self.model.state_dict()))
        statistics = ((self.model.pretrained_cfg[key], shift) for key, shift in (("mean", 1.0), ("std", 0.0)))
        mean, std = ([2 * value - shift for value in values] for values, shift in statistics)
        _materialize(self.model, name)
        self.model.to(dtype)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, arithmetic and maps."""
        return next(self.model.parameters()).dtype

    def weights(self) -> dict[str, Float[Tensor, "..."]]:
        """What a file of weights fills, by timm's names; names in ``unused`` belong to layers that are not evaluated."""
        return dict(self.model.state_dict())

    @torch.no_grad()
    def init_weights(self, seed: int) -> Self:
        """Random weights from the streams "init/<network>.<name>", for runs and tests without trained ones."""
        random_weights(self.weights(), seed, self.name)
        return self

    def forward(self, x_NCHW: Float[Tensor, "N C H W"]) -> Maps:
        """Images in [-1, 1], 1 or 3 channels, to the maps [N, shape.channels, shape.side, shape.side] of ``shapes``."""
        x_NCHW = resize(three_colours(x_NCHW), self.size)
        x_NCHW = ((x_NCHW - self.mean) / self.std).to(self.dtype, memory_format=torch.channels_last)
        return self.model.forward_intermediates(x_NCHW, indices=self.indices, intermediates_only=True, stop_early=True)


def check_feature_network(name: str, size: int) -> None:
    """Raise the ConfigError that ``FeatureNetwork`` would, at no cost in memory."""
    _choose_maps(_skeleton(name, size), name, size)


def map_distance(x_maps: Maps, y_maps: Maps, weights: Sequence[Float[Tensor, " _"]] | None = None) -> Float[Tensor, " N"]:
    """sum_l mean_hw sum_c w_lc (x^_l - y^_l)^2 with x^ = x / sqrt(||x||^2 + 1e-8), the norm over the channels.

    fp32 or better, whatever the dtype of the maps; w = 1 without weights. arXiv 1801.03924, Eq. 1 (with w for its w^2).
    """
    distances = []
    for level, (x_NCHW, y_NCHW) in enumerate(zip(x_maps, y_maps, strict=True)):
        square_NCHW = (_unit_channels(x_NCHW) - _unit_channels(y_NCHW)).square()
        if weights is not None:
            square_NCHW = square_NCHW * weights[level][:, None, None]
        distances.append(square_NCHW.sum(1).mean((1, 2)))
    return torch.stack(distances).sum(0)


def three_colours(x_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N 3 H W"]:
    """Gray images repeated to three channels; raises ValueError for other numbers of channels."""
    if x_NCHW.shape[1] not in (1, 3):
        raise ValueError(f"images have {x_NCHW.shape[1]} channels, feature networks take 1 or 3")
    return x_NCHW.expand(-1, 3, -1, -1)


def resize(x_NCHW: Float[Tensor, "N C H W"], side: int) -> Float[Tensor, "N C S S"]:
    """Bilinear resizing (pixel centres at half integers, no filter) to ``side``; images of that size stay as they are."""
    if x_NCHW.shape[2:] == (side, side):
        return x_NCHW
    return F.interpolate(x_NCHW, size=(side, side), mode="bilinear", align_corners=False)


def random_weights(weights: Mapping[str, Float[Tensor, "..."]], seed: int, name: str) -> None:
    """Fill tensors by name: matrices and kernels N(0, 2 / fan_in), scales and variances 1, everything else 0.

    The values come from the streams "init/<name>.<key>". arXiv 1502.01852, Eq. 10.
    """
    for key, value in weights.items():
        if value.ndim < 2:
            value.fill_(1 if key.endswith(("weight", "running_var")) else 0)
            continue
        only = torch.zeros(1, dtype=torch.int64, device=value.device)
        noise = Stream(seed, f"init/{name}.{key}").normal(only, tuple(value.shape))[0]
        value.copy_(noise * math.sqrt(2 / fans(value.shape)[0]))


def _unit_channels(x_NCHW: Tensor) -> Tensor:
    x_NCHW = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    return x_NCHW * torch.rsqrt(x_NCHW.square().sum(1, keepdim=True) + EPS)


def _skeleton(name: str, size: int) -> Any:
    """The network without values: timm draws initial weights from the global generator, but none on the device "meta"."""
    timm = optional_package("timm")
    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained=False)
        except RuntimeError as error:
            near = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:5])
            raise ConfigError(f"timm has no feature network '{name}' ({error}); near: {near or 'none'}") from error
        fixed = model.pretrained_cfg["input_size"][-1] != size and hasattr(model, "set_input_size")
        if fixed:
            model.set_input_size(img_size=size)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
        raise ConfigError(f"the network '{name}' of timm gives no feature maps; choose one with forward_intermediates")
    return model


def _choose_maps(model: Any, name: str, size: int) -> tuple[list[int], tuple[MapShape, ...]]:
    info = list(model.feature_info)
    if len(info) < NUM_MAPS:
        raise ConfigError(f"the network '{name}' of timm has {len(info)} feature maps, {NUM_MAPS} are needed")
    if len({entry["reduction"] for entry in info}) == 1:
        patch = info[0]["reduction"]
        if size % patch:
            raise ConfigError(
                f"the network '{name}' of timm sees patches of {patch} pixels, which do not divide a side of {size}"
            )
        indices = [len(info) * (part + 1) // NUM_MAPS - 1 for part in range(NUM_MAPS)]
    else:
        indices = list(range(len(info) - NUM_MAPS, len(info)))
    chosen = [info[index] for index in indices]
    # A strided convolution with padding rounds up.
    return indices, tuple(MapShape(entry["num_chs"], -(-size // entry["reduction"]), entry["reduction"]) for entry in chosen)


def _materialize(model: Any, name: str) -> None:
    """Memory for the weights, all NaN, and the constants that no file holds."""
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(math.nan if value.is_floating_point() else 0)
    for module in model.modules():
        if module._non_persistent_buffers_set:
            if not hasattr(module, "init_non_persistent_buffers"):
                raise ConfigError(
                    f"the network '{name}' of timm has constants ({type(module).__name__}) that it cannot rebuild"
                )
            module.init_non_persistent_buffers()
