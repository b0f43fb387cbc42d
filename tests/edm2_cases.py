"""Small EDM2 networks and what they are given."""

import torch

from fastcm.nn import EDM2UNet
from fastcm.random import Stream


def tiny(**options) -> EDM2UNet:
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    small = {"channels_per_head": 16, "logvar_channels": 8}
    return EDM2UNet(8, 1, **(sizes | small | options)).init_weights(0)


def with_gains(net: EDM2UNet, gain: float = 0.5) -> EDM2UNet:
    """The network with open gains: at 0, as they begin, neither input nor embedding would matter."""
    with torch.no_grad():
        for weight in net.parameters():
            if not weight.ndim:
                weight.fill_(gain)
    return net


def inputs(n=3, channels=1, size=8, first=0):
    index = torch.arange(first, first + n)
    return Stream(0, "x").image_normal(index, (channels, size, size)), Stream(0, "c_noise").normal(index)


def dropout_key(n=3, first=0, seed=0):
    return Stream(seed, "dropout").at(torch.arange(first, first + n))
