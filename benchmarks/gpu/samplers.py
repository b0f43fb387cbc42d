"""The parts of the GPU report that measure sampling, and other projects beside ours."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.baselines.contestants import Contestant, Setup, backend, our_contestant, ours, tf32
from benchmarks.baselines.peers import NotInstalledError, commit, diffusers_sampler, ect_step, fastgen_step
from benchmarks.gpu.size import Items, Size
from benchmarks.gpu.steps import measured_step
from benchmarks.measuring.step_time import count_kernels
from fastcm.bench.ceilings import cudnn_search
from fastcm.bench.timing import time_host
from fastcm.config import load_config
from fastcm.diffusion.preconditioners import EDMBoundary
from fastcm.model import Model, SamplingDefaults
from fastcm.nn.build import build_network
from fastcm.sampling import accelerate, sample

Load = Callable[[Size], Model]

# Item: how its step is made, its dtype, and whether TF32 is allowed; the first word is the peer. None is compiled.
STEPS = {
    "ect tf32": (ect_step, "float32", True),
    "fastgen amp": (fastgen_step, "bfloat16", False),
    "ect fp32": (ect_step, "float32", False),
}


def sampler_part(size: Size) -> Items:
    """One and two steps of the network, a single image and a batch."""
    for name in size.backends:
        for num in size.samples:
            for steps in (1, 2):
                yield f"fastcm {name}, {steps} steps, batch {num}", partial(_sample, size, name, num, steps, _own_model)
    name = size.backends[0]
    for num in size.samples:
        yield f"fastcm {name} as loaded, batch {num}", partial(_sample, size, name, num, 1, _own_model, fast=False)


@cache
def _own_model(size: Size) -> Model:
    return ours(Setup(size.network, "ect", 4, size.device), size.dtype).sampling_model()


@cache
def _accelerated(load: Load, size: Size, name: str) -> Model:
    """The model with its evaluations compiled and replayed, by the kernels of one backend."""
    return accelerate(load(size))


def _sample(size: Size, name: str, num: int, steps: int, load: Load, fast: bool = True) -> dict[str, Any]:
    """A sampler on one backend. fast: accelerated where there is a GPU, which is what accelerates."""
    fast = fast and size.device.type == "cuda"
    model = partial(_accelerated, load, size, name) if fast else partial(load, size)
    timed = _time_sampler(size, name, lambda: sample(model(), num, steps, batch_size=num), num)
    return {"steps": steps, "dtype": size.dtype, "compiled": fast, "cuda_graph": fast, **timed}


def _time_sampler(size: Size, name: str, draw: Callable[[], object], num: int) -> dict[str, Any]:
    def call() -> None:
        draw()
        if size.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), tf32(True), cudnn_search(), backend(name):
        call()
        timing = time_host([call], size.step_s / 4)
        kernels = count_kernels(call, size.device)
    return {"batch": num, "images_per_s": num / (timing.median_us * 1e-6), "call": timing._asdict(), **kernels}


def peers_part(size: Size) -> Items:
    """Steps of other projects beside ours, then samplers with the network that diffusers has too."""
    setup = Setup(size.network, "ect", 128 // size.step_divisor, size.device, size.compiler)
    name = size.backends[0]
    yield f"fastcm {name}", partial(measured_step, setup, size, our_contestant(setup, size.dtype, size.compiled), name)
    for item, (make, dtype, allowed) in STEPS.items():
        contestant = Contestant(partial(make, setup), dtype, tf32=allowed)
        yield item, partial(_of_peer, item.split()[0], partial(measured_step, setup, size, contestant))
    for num in size.samples:
        draw = partial(_sample, size, name, num, 1, _openai_model)
        yield f"fastcm {name} sampling, batch {num}", draw
        yield f"fastcm {name} sampling as loaded, batch {num}", partial(draw, fast=False)  # eager, as diffusers' pipeline
        yield f"diffusers sampling, batch {num}", partial(_of_peer, "diffusers", partial(_diffusers, size, num))


def _of_peer(peer: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"commit": commit(peer), **work()}
    except NotInstalledError as error:
        return {"unavailable": str(error)}


def _diffusers(size: Size, num: int) -> dict[str, Any]:
    draw = diffusers_sampler(_openai_model(size), num, getattr(torch, size.dtype))
    mode = {"dtype": size.dtype, "compiled": False, "cuda_graph": False}
    return {"steps": 1, **mode, **_time_sampler(size, "torch", draw, num)}


@cache
def _openai_model(size: Size) -> Model:
    """A consistency model that diffusers can run, with fresh weights: ImageNet-64's, or a toy."""
    network, side = load_config("cd_imagenet64").network, 64
    if size.device.type == "cpu":
        toy = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
        network, side = network.model_copy(update=toy), 16
    net = build_network(network, (3, side, side), label_dim=10)
    net.init_weights(0)
    options = {"label_dim": 10, "dtype": getattr(torch, size.dtype), "sampling": SamplingDefaults("consistency")}
    return Model(net, EDMBoundary(), (3, side, side), **options).to(size.device).eval().requires_grad_(False)
