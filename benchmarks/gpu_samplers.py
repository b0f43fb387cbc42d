"""The parts of the GPU report that measure sampling, and other projects beside ours."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.contestants import Setup, backend, ours, tf32
from benchmarks.gpu_size import Items, Size
from benchmarks.gpu_steps import measured_step
from benchmarks.peers import NotInstalledError, commit, diffusers_sampler, ect_step, fastgen_step
from benchmarks.step_time import count_kernels
from fastcm.bench.ceilings import cudnn_search
from fastcm.bench.timing import time_host
from fastcm.config import load_config
from fastcm.diffusion.preconditioners import EDMBoundary
from fastcm.model import Model, SamplingDefaults
from fastcm.nn.build import build_network
from fastcm.sampling import accelerate, sample

# Item: how its step is made, and whether TF32 is allowed; the first word is the peer.
STEPS = {"ect tf32": (ect_step, True), "fastgen amp": (fastgen_step, False), "ect fp32": (ect_step, False)}


def sampler_part(size: Size) -> Items:
    """One and two steps of the network, a single image and a batch."""
    for name in size.backends:
        for num in size.samples:
            for steps in (1, 2):
                yield f"fastcm {name}, {steps} steps, batch {num}", partial(_sample, size, name, num, steps, _sampling_model)
    for num in size.samples:
        yield (
            f"fastcm {size.backends[0]} as loaded, batch {num}",
            partial(_sample, size, size.backends[0], num, 1, _loaded_model),
        )


@cache
def _loaded_model(size: Size, name: str) -> Model:
    return ours(Setup(size.network, "ect", 4, size.device), size.dtype).sampling_model()


@cache
def _sampling_model(size: Size, name: str) -> Model:
    """The model with its evaluations compiled and replayed, by the kernels of one backend."""
    return _accelerated(_loaded_model(size, name))


def _accelerated(model: Model) -> Model:
    return accelerate(model) if next(model.parameters()).is_cuda else model


def _sample(size: Size, name: str, num: int, steps: int, model: Callable[[Size, str], Model]) -> dict[str, Any]:
    return {"steps": steps, **_time_sampler(size, name, lambda: sample(model(size, name), num, steps, batch_size=num), num)}


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
    yield f"fastcm {name}", partial(measured_step, setup, size, lambda: ours(setup, size.dtype, size.compiled).step, True, name)
    for item, (make, allowed) in STEPS.items():
        yield item, partial(_of_peer, item.split()[0], partial(measured_step, setup, size, partial(make, setup), allowed))
    for num in size.samples:
        yield f"fastcm {name} sampling, batch {num}", partial(_sample, size, name, num, 1, _fast_openai_model)
        yield f"diffusers sampling, batch {num}", partial(_of_peer, "diffusers", partial(_diffusers, size, num))


def _of_peer(peer: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"commit": commit(peer), **work()}
    except NotInstalledError as error:
        return {"unavailable": str(error)}


def _diffusers(size: Size, num: int) -> dict[str, Any]:
    draw = diffusers_sampler(_openai_model(size), num, getattr(torch, size.dtype))
    return {"steps": 1, **_time_sampler(size, "torch", draw, num)}


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


@cache
def _fast_openai_model(size: Size, name: str) -> Model:
    return _accelerated(_openai_model(size))
