"""What the names and shapes of a state dict tell of the U-Net it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.errors import CheckpointError
from fastcm.nn.blocks import Block
from fastcm.nn.build import build_network
from fastcm.nn.families import FAMILIES
from fastcm.nn.network import Network
from fastcm.nn.unet import UNet


@dataclass(frozen=True)
class UNetFacts:
    """The network section that fits a state dict, the (C, H, W) of its images, and the widths of its conditions."""

    network: UNetConfig
    image_shape: tuple[int, int, int]
    label_dim: int
    augment_dim: int

    def build(self) -> Network:
        """The network, without weights. Raises ConfigError for one that cannot be."""
        return build_network(self.network, self.image_shape, self.label_dim, self.augment_dim)


def attention_heads(unet: UNet) -> dict[str, int]:
    """Number of heads by name of each qkv parameter."""
    blocks = {name: block.num_heads for name, block in unet.named_modules() if isinstance(block, Block) and block.num_heads}
    return {f"{name}.qkv.{leaf}": heads for name, heads in blocks.items() for leaf in ("weight", "bias")}


def shape_of(state: Mapping[str, Float[Tensor, "..."]], name: str, ndim: int = 1) -> tuple[int, ...]:
    """The shape of one entry. Raises CheckpointError where there is none, or one of fewer than ``ndim`` axes."""
    if name not in state:
        raise CheckpointError(f"the checkpoint lacks {name}, which every network of this kind has")
    shape = tuple(state[name].shape)
    if len(shape) < ndim:
        raise CheckpointError(f"{name} has shape {shape}, but in a network of this kind it has {ndim} axes or more")
    return shape


def whole_multiple(width: int, base: int, name: str) -> int:
    """width / base. Raises CheckpointError where that is no whole number; ``name`` says where the width was seen."""
    if not base or not width or width % base:
        raise CheckpointError(f"{name} is {width} channels wide, which is no multiple of model_channels {base}")
    return width // base


def merged_overrides(family: str, seen: Mapping[str, Any], given: FamilyOverrides) -> FamilyOverrides:
    """What was seen in a checkpoint and what was given on top, as far as it differs from the family.

    Raises CheckpointError where the two contradict each other.
    """
    for name, value in given.given().items():
        if name in seen and seen[name] != value:
            raise CheckpointError(f"{name} was given as {value}, but by its names and shapes the checkpoint has {seen[name]}")
    merged = {**seen, **given.given()}
    return FamilyOverrides(**{name: value for name, value in merged.items() if value != getattr(FAMILIES[family], name)})
