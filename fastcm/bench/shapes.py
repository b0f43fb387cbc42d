"""The shapes of every kernel call in one forward pass of a network, read off the network itself on the meta device."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastcm.config import load_config
from fastcm.nn.blocks import Block
from fastcm.nn.build import build_network
from fastcm.nn.edm2 import MPBlock
from fastcm.nn.layers import GroupNorm

# Shape set: the configuration whose network it is, images (C, H, W), classes and augmentation labels.
SHAPE_SETS = {
    "ddpmpp32": ("ect_cifar10", (3, 32, 32), 0, 9),
    "adm64": ("ect_imagenet64_adm", (3, 64, 64), 1000, 0),
}
# A network without group norm and with the attention of adm64: there is nothing further to compile or tune for it.
FURTHER_SETS = {"edm2-64": ("edm2_imagenet64_s", (3, 64, 64), 1000, 0)}
# Small enough for any machine: to try the benchmark itself.
TOY_SETS = {"digits8": ("digits", (1, 8, 8), 0, 0)}
ALL_SETS = SHAPE_SETS | FURTHER_SETS | TOY_SETS


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


class ConvShape(NamedTuple):
    """One kind of call of a convolution: channels, side of its input (after resampling) and of its kernel, stride, padding."""

    in_channels: int
    out_channels: int
    resolution: int
    kernel: int
    stride: int
    padding: int

    @property
    def flops_per_image(self) -> int:
        """Floating-point operations of the forward pass; each of the two gradients takes as many."""
        side = (self.resolution + 2 * self.padding - self.kernel) // self.stride + 1
        return 2 * self.in_channels * self.out_channels * self.kernel**2 * side**2


def kernel_calls(shape_set: str) -> Counter[GroupNormShape | AttentionShape]:
    """How often one training forward pass of the network makes each kind of call, dropout included."""
    calls: Counter[GroupNormShape | AttentionShape] = Counter()
    net = _network(shape_set)
    for module in net.modules():
        _watch(module, calls)
    _forward(net, shape_set)
    return calls


def conv_calls(shape_set: str) -> Counter[ConvShape]:
    """How often one forward pass of the network makes each kind of convolution."""
    net, watcher = _network(shape_set), _ConvWatcher()
    with watcher:
        _forward(net, shape_set)
    return watcher.calls


def parameter_shapes(shape_set: str) -> list[tuple[int, ...]]:
    """The shapes of the network's parameters."""
    return [tuple(p.shape) for p in _network(shape_set).parameters()]


def _network(shape_set: str) -> nn.Module:
    config_name, image_shape, label_dim, augment_dim = ALL_SETS[shape_set]
    with torch.device("meta"):
        return build_network(load_config(config_name).network, image_shape, label_dim, augment_dim, dropout=0.1)


def _forward(net: nn.Module, shape_set: str) -> None:
    with torch.device("meta"):
        net(torch.empty(1, *ALL_SETS[shape_set][1]), torch.empty(1))


class _ConvWatcher(TorchFunctionMode):
    """Counts convolutions where they are called, so whatever the layers did to their inputs before is done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[ConvShape] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            self._count(args[0], args[1], kwargs.get("stride", 1), kwargs.get("padding", 0))
        return func(*args, **kwargs)

    def _count(self, x_NCHW: Tensor, weight_OIHW: Tensor, stride: int, padding: int) -> None:
        out_channels, in_channels, kernel, _ = weight_OIHW.shape
        self.calls[ConvShape(in_channels, out_channels, x_NCHW.shape[2], kernel, stride, padding)] += 1


def _watch(module: nn.Module, calls: Counter[GroupNormShape | AttentionShape]) -> None:
    """Have a module count its calls."""

    def count_norm(norm: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        _, channels, height, _ = args[0].shape
        flags = (options.get("addend_NC") is not None, options.get("scale_NC") is not None, options.get("silu", False))
        calls[GroupNormShape(channels, height, norm.num_groups, *flags, options.get("dropout", 0.0) > 0)] += 1

    if isinstance(module, GroupNorm):
        module.register_forward_pre_hook(count_norm, with_kwargs=True)
    if isinstance(module, Block | MPBlock) and module.num_heads:
        shape = AttentionShape(0, module.num_heads, module.out_channels // module.num_heads)

        def count_attention(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[shape._replace(tokens=args[0].shape[2] * args[0].shape[3])] += 1

        projection = module.qkv if isinstance(module, Block) else module.attn_qkv
        projection.register_forward_pre_hook(count_attention)
