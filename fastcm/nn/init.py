"""How weights begin: each layer carries an ``Init`` and draws its values from a named random stream.

Reference: Glorot and Bengio, AISTATS 2010, Eq. 16 (xavier); He et al., arXiv 1502.01852, Eq. 10 (kaiming).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastcm.random import Stream


@dataclass(frozen=True)
class Init:
    """A distribution for a layer's weight and the factors on its weight and bias (a factor of 0 means zeros)."""

    mode: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]
    weight: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class InitScheme:
    """The distributions of one family of networks.

    layer: every layer without a rule of its own; output: the last layer of each residual branch and of the network;
    qkv: the layer before attention; augment: the embedding of augmentation labels.
    """

    layer: Init
    output: Init
    qkv: Init
    augment: Init


ZEROS = Init("xavier_uniform", weight=0.0)


def fans(shape: torch.Size) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight [out, in] or [out, in, k, k]: in k^2 and out k^2."""
    taps = math.prod(shape[2:])
    return shape[1] * taps, shape[0] * taps


def unset(*shape: int) -> nn.Parameter:
    """A parameter that is all NaN, so that a network that was neither initialised nor loaded cannot go unnoticed.

    Convolution weights (4-D) are channels_last in memory. No random number is drawn.
    """
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return nn.Parameter(torch.empty(shape, memory_format=memory_format).fill_(math.nan))


def init_layer(init: Init, weight: Tensor, bias: Tensor | None, seed: int, name: str) -> None:
    """Fill the weight and bias of the layer called ``name`` in place; both use the fans of the weight."""
    fan_in, fan_out = fans(weight.shape)
    weight.copy_(draw(init.mode, init.weight, weight, fan_in, fan_out, Stream(seed, f"init/{name}.weight")))
    if bias is not None:
        bias.copy_(draw(init.mode, init.bias, bias, fan_in, fan_out, Stream(seed, f"init/{name}.bias")))


def draw(mode: str, factor: float, like: Tensor, fan_in: int, fan_out: int, stream: Stream) -> Tensor:
    """A tensor shaped like ``like``: factor times one of

    xavier_uniform sqrt(6 / (fan_in + fan_out)) U(-1, 1); kaiming_uniform sqrt(3 / fan_in) U(-1, 1);
    kaiming_normal sqrt(1 / fan_in) N(0, 1).
    """
    if factor == 0:
        return torch.zeros_like(like)
    only = torch.zeros(1, dtype=torch.int64, device=like.device)
    if mode == "kaiming_normal":
        return stream.normal(only, tuple(like.shape))[0] * (factor * math.sqrt(1 / fan_in))
    bound = math.sqrt(6 / (fan_in + fan_out)) if mode == "xavier_uniform" else math.sqrt(3 / fan_in)
    return (stream.uniform(only, tuple(like.shape))[0] * 2 - 1) * (factor * bound)
