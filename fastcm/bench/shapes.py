"""The shapes of every kernel call in one forward pass of a network, read off the network itself on the meta device."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from fastcm.config import load_config
from fastcm.nn.blocks import Block
from fastcm.nn.build import build_network
from fastcm.nn.layers import GroupNorm

# Shape set: the configuration whose network it is, images (C, H, W), classes and augmentation labels.
SHAPE_SETS = {
    "ddpmpp32": ("ect_cifar10", (3, 32, 32), 0, 9),
    "adm64": ("ect_imagenet64_adm", (3, 64, 64), 1000, 0),
}


class GroupNormShape(NamedTuple):
    """One kind of call of group norm."""

    channels: int
    resolution: int
    num_groups: int
    addend: bool
    film: bool
    silu: bool
    dropout: bool


class AttentionShape(NamedTuple):
    """One kind of call of attention: tokens T of one image, heads, channels of a head."""

    tokens: int
    num_heads: int
    head_dim: int


def kernel_calls(shape_set: str) -> Counter[GroupNormShape | AttentionShape]:
    """How often one training forward pass of the network makes each kind of call, dropout included."""
    config_name, image_shape, label_dim, augment_dim = SHAPE_SETS[shape_set]
    calls: Counter[GroupNormShape | AttentionShape] = Counter()
    with torch.device("meta"):
        net = build_network(load_config(config_name).network, image_shape, label_dim, augment_dim, dropout=0.1)
        for module in net.modules():
            _watch(module, calls)
        net(torch.empty(1, *image_shape), torch.empty(1))
    return calls


def _watch(module: nn.Module, calls: Counter[GroupNormShape | AttentionShape]) -> None:
    """Have a module count its calls."""

    def count_norm(norm: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        _, channels, height, _ = args[0].shape
        flags = (options.get("addend_NC") is not None, options.get("scale_NC") is not None, options.get("silu", False))
        calls[GroupNormShape(channels, height, norm.num_groups, *flags, options.get("dropout", 0.0) > 0)] += 1

    if isinstance(module, GroupNorm):
        module.register_forward_pre_hook(count_norm, with_kwargs=True)
    if isinstance(module, Block) and module.num_heads:
        shape = AttentionShape(0, module.num_heads, module.out_channels // module.num_heads)

        def count_attention(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[shape._replace(tokens=args[0].shape[2] * args[0].shape[3])] += 1

        module.qkv.register_forward_pre_hook(count_attention)
