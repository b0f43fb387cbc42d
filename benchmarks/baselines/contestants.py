"""Whole training steps to measure side by side, with equal weights: the plain baselines and fastcm's own.

This is the one place that says what a baseline is; the step ratio, the pytest-benchmark suite and the GPU report share it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines.plain import CompiledPlainStep, PlainStep, PlainUNet
from fastcm import ops
from fastcm.config import ComputeConfig, Config, load_config
from fastcm.data.dataset import ResidentDataset
from fastcm.data.loader import to_unit_range
from fastcm.kernels.runtime.fallback import set_strict
from fastcm.random import Stream
from fastcm.train.build import compute_settings
from fastcm.train.phase import Phase

Step = Callable[[], object]

# Objective: the phase of a configuration that trains it.
PHASES = {"edm": "pretrain", "ect": "tune"}
# Name of a network: the configuration of each objective, side and channels of the images.
NETWORKS = {
    "digits": ({"edm": "digits", "ect": "digits"}, 8, 1),
    "smoke_cifar10": ({"edm": "smoke_cifar10", "ect": "smoke_cifar10"}, 32, 3),
    "ddpmpp": ({"edm": "edm_cifar10", "ect": "ect_cifar10"}, 32, 3),
}
CPU_NETWORKS = ("digits", "smoke_cifar10")  # small enough to step on a CPU


class Setup(NamedTuple):
    """What all contestants have in common."""

    network: str
    objective: str
    batch_size: int
    device: torch.device
    compiler: str = "inductor"

    @property
    def phase(self) -> str:
        """The name of the phase."""
        return PHASES[self.objective]

    def config(self, dtype: str, compiled: bool, *further: str) -> Config:
        """The configuration, without dropout, flips and augmentation, which the plain step does not have; further overrides."""
        name = NETWORKS[self.network][0][self.objective]
        options = [f"batch_size={self.batch_size}", "dropout=0.0", "augment=0.0", "init=fresh"]
        phases = load_config(name).phases
        options = [f"phases.{phase}.{option}" for phase in phases for option in options]
        options += ["phases.tune.objective.q=256"] if "tune" in phases else []
        compute = [f"compute.dtype={dtype}", f"compute.compile='{'on' if compiled else 'off'}'"]  # YAML: on is true
        return load_config(name, [*options, "data.xflip=false", f"compute.device={self.device.type}", *compute, *further])


class Contestant(NamedTuple):
    """A step to measure: how it is made, and how it runs.

    dtype: of its convolutions. cuda_graph: the whole step is replayed.
    """

    make: Callable[[], Step]
    dtype: str
    tf32: bool = True
    compiled: bool = False
    cuda_graph: bool = False

    @property
    def mode(self) -> dict[str, str | bool]:
        """What stands beside its numbers; TF32 is a property of fp32 products."""
        tf32 = self.dtype == "float32" and self.tf32
        return {"dtype": self.dtype, "tf32": tf32, "compiled": self.compiled, "cuda_graph": self.cuda_graph}


def random_dataset(resolution: int, channels: int, device: torch.device, num: int = 512) -> ResidentDataset:
    """Images of random pixels: the time of a step does not depend on what they show."""
    index = torch.arange(num, device=device)
    pixels = Stream(0, "benchmark").integers(index, 256, (resolution, resolution, channels)).to(torch.uint8)
    return ResidentDataset(pixels, None, 0, "random pixels", "random pixels")


def ours(setup: Setup, dtype: str = "float32", compiled: bool = False, *further: str) -> Phase:
    """fastcm's phase with fresh weights; its step runs on the backends that hold when it is called."""
    _, resolution, channels = NETWORKS[setup.network]
    dataset = random_dataset(resolution, channels, setup.device)
    phase = Phase(setup.config(dtype, compiled, *further), setup.phase, dataset, setup.device, 0)
    phase.start(None)
    return phase


def plain(setup: Setup, compiled: bool = False) -> PlainStep:
    """The baseline with the weights that ``ours`` begins with: literal, or compiled channels_last bf16."""
    _, resolution, channels = NETWORKS[setup.network]
    network = setup.config("float32", False).network
    start = ours(setup)
    net = PlainUNet(
        resolution, channels, network.model_channels, network.channel_mult, network.num_blocks, network.attn_resolutions[0]
    ).to(setup.device)
    net.load_state_dict(start.model.net.state_dict())
    images: Tensor = to_unit_range(start.loader.dataset.images).contiguous()
    arguments = (net, images, setup.batch_size, setup.objective)
    return CompiledPlainStep(*arguments, compiler=setup.compiler) if compiled else PlainStep(*arguments)


def our_contestant(setup: Setup, dtype: str, compiled: bool, *further: str) -> Contestant:
    """``ours`` as its configuration runs it: on CUDA the whole step is one graph unless a further override says otherwise."""
    graph = setup.device.type == "cuda" and setup.config(dtype, compiled, *further).compute.cuda_graph != "off"
    return Contestant(lambda: ours(setup, dtype, compiled, *further).step, dtype, compiled=compiled, cuda_graph=graph)


def plain_contestants(setup: Setup) -> dict[str, Contestant]:
    """The baselines by name, the fair one first; none of them is replayed as a graph."""
    literal = Contestant(lambda: plain(setup), "float32", tf32=False)
    compiled = Contestant(lambda: plain(setup, compiled=True), "bfloat16", compiled=True)
    return {"compiled bf16": compiled, "eager fp32": literal, "eager tf32": literal._replace(tf32=True)}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 for fp32 products while the block runs."""
    with compute_settings(ComputeConfig(tf32=allowed)):
        yield


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops on one backend; where kernels are asked for, a reference that stands in for one is an error."""
    before = set_strict(name != "torch")
    try:
        with ops.use_backend(name):
            yield
    finally:
        set_strict(before)
