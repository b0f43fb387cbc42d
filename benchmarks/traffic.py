"""Bytes and launches of a forward pass by item, and what each fusion could save: a model to decide what is worth building.

    python -m benchmarks.traffic [--shapes ddpmpp32|adm64] [--batch-size 128] [--bandwidth 4.3e12] [--launch-us 2]

The network runs on the meta device and every operation on images outside group norm and attention (our kernels) is counted:
each tensor read or written once per operation, 2 bytes an element. A fusion's time is its bytes over the bandwidth plus its
launches times the cost of a small kernel inside a CUDA graph. These are predictions: decisions and, once a GPU has measured
them, outcomes stand in NOTES.md.
"""

import argparse
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcm.bench.shapes import SHAPE_SETS
from fastcm.config import load_config
from fastcm.nn.blocks import Block
from fastcm.nn.build import build_network
from fastcm.nn.layers import GroupNorm

ITEMSIZE = 2
aten = torch.ops.aten
ITEMS = {
    aten.convolution.default: "convolution",
    aten.cat.default: "concatenation",
    aten.add.Tensor: "residual add",
    aten.mul.Tensor: "residual scale",
    aten.avg_pool2d.default: "resample",
    aten.upsample_nearest2d.vec: "resample",
    aten.upsample_nearest2d.default: "resample",
    aten.addmm.default: "embedding",
}


class Traffic(NamedTuple):
    """Bytes and launches of one item, per forward pass of one image."""

    bytes: int
    launches: int


class Count(TorchDispatchMode):
    """Adds up bytes and calls of operations by item, while ``paused`` is false."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count, then do."""
        result = func(*args, **(kwargs or {}))
        item = ITEMS.get(func)
        if item and not self.paused and (result.ndim == 4) == (item != "embedding"):
            tensors = [value for value in tree_leaves((args, result)) if isinstance(value, torch.Tensor)]
            images = [value for value in tensors if value.ndim == 4 and len(value) == 1]
            self.bytes[item] += ITEMSIZE * sum(value.numel() for value in images)
            self.calls[item] += 1
        return result

    def pause_in(self, module: nn.Module) -> None:
        """Leave out what happens inside a module."""
        module.register_forward_pre_hook(lambda *_: setattr(self, "paused", True))
        module.register_forward_hook(lambda *_: setattr(self, "paused", False))


def forward_traffic(shape_set: str) -> dict[str, Traffic]:
    """Traffic of one forward pass of one image by item."""
    config_name, image_shape, label_dim, augment_dim = SHAPE_SETS[shape_set]
    count = Count()
    with torch.device("meta"), torch.no_grad():
        net = build_network(load_config(config_name).network, image_shape, label_dim, augment_dim)
        for module in net.modules():
            if isinstance(module, GroupNorm):
                count.pause_in(module)
        with count:
            net(torch.empty(1, *image_shape), torch.empty(1))
    return {item: Traffic(count.bytes[item], count.calls[item]) for item in count.calls}


class Fusion(NamedTuple):
    """What a fusion saves per forward pass of one image over a compiler that fuses neighbouring pointwise operations."""

    name: str
    bytes: float
    launches: int


def fusions(shape_set: str) -> list[Fusion]:
    """The candidates, each with the reason for its bytes."""
    items = forward_traffic(shape_set)
    none = Traffic(0, 0)
    concat, down_up = items.get("concatenation", none), items.get("resample", none)
    num_blocks = sum(isinstance(module, Block) for module in _network(shape_set).modules())
    return [
        # A compiler already makes one pass of add and scale, and adds conv1's bias in it (conv0's is added by the norm).
        Fusion("residual add and scale in a kernel of our own", 0.0, 0),
        # The copy goes (one read, one write), but the 1x1 shortcut becomes two products of which the second reads and writes
        # its output once more; the output has half the channels of the concatenation.
        Fusion("inputs of decoder blocks without concatenation", concat.bytes / 2, 0),
        # On the main branch the full-resolution tensor between norm and resampling is neither written nor read: all of the
        # item's bytes there but the quarter-size result, which is written in any case; the shortcut keeps its own.
        Fusion("2x2 box resampling in the store of the norm", down_up.bytes / 2, down_up.launches // 2),
        Fusion("one matrix product for all embedding projections", 0.0, num_blocks - 1),
    ]


def _network(shape_set: str) -> nn.Module:
    config_name, image_shape, label_dim, augment_dim = SHAPE_SETS[shape_set]
    with torch.device("meta"):
        return build_network(load_config(config_name).network, image_shape, label_dim, augment_dim)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPE_SETS, default="ddpmpp32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    parser.add_argument("--launch-us", type=float, default=2.0, help="a small kernel inside a CUDA graph")
    arguments = parser.parse_args()
    print(f"{arguments.shapes}: one forward pass of one image")
    for item, traffic in forward_traffic(arguments.shapes).items():
        print(f"  {item:<52}{traffic.bytes / 1e6:8.1f} MB{traffic.launches:6d} launches")
    print(f"saved per forward pass at batch {arguments.batch_size} (prediction)")
    for fusion in fusions(arguments.shapes):
        time_us = fusion.bytes * arguments.batch_size / arguments.bandwidth * 1e6 + fusion.launches * arguments.launch_us
        print(f"  {fusion.name:<52}{fusion.bytes / 1e6:8.1f} MB{fusion.launches:6d} launches{time_us:8.0f} us")


if __name__ == "__main__":
    main()
