"""The parts of the GPU report that measure whole training steps of ours and of the plain baselines."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor

from benchmarks.baselines.contestants import Contestant, Setup, Step, backend, our_contestant, plain_contestants, tf32
from benchmarks.gpu.breakdown import break_down
from benchmarks.gpu.size import Items, Size
from benchmarks.measuring.step_time import measure_step
from fastcm.bench.ceilings import cudnn_search
from fastcm.errors import ConfigError
from fastcm.train.phase import Phase

GRAPH_OFF = "compute.cuda_graph='off'"  # YAML: off is false


def step_part(objective: str, batch_size: int, size: Size) -> Items:
    """One training step of the network: ours with each backend and without a graph, the plain baselines."""
    setup = Setup(size.network, objective, batch_size // size.step_divisor, size.device, size.compiler)
    # Ours first: what a part that runs out of time has not measured should be a baseline.
    mine, first = our_contestant(setup, size.dtype, size.compiled), size.backends[0]
    plain_launches = our_contestant(setup, size.dtype, size.compiled, GRAPH_OFF)  # as the compiled baseline, which has no graph
    yield f"fastcm {first}", partial(measured_step, setup, size, mine, first)
    yield f"fastcm {first}, graph off", partial(measured_step, setup, size, plain_launches, first)
    for name in size.backends[1:]:
        yield f"fastcm {name}", partial(measured_step, setup, size, mine, name)
    for name, contestant in plain_contestants(setup).items():
        yield name, partial(measured_step, setup, size, contestant)


def measured_step(
    setup: Setup,
    size: Size,
    contestant: Contestant,
    kernels: str = "torch",
    further: Callable[[Step], dict[str, Any]] = lambda step: {},
) -> dict[str, Any]:
    """Mode, time, memory, launches and loss of a step on one backend of the kernels, and what ``further`` finds out."""
    torch.compiler.reset()
    with tf32(contestant.tf32), cudnn_search(), backend(kernels):
        step = contestant.make()
        result = measure_step(step, setup.batch_size, setup.device, size.step_s)
        result |= {"loss": _loss(step), **further(step)}
    if not math.isfinite(result["loss"]):
        raise RuntimeError(f"the loss after {result['step_ms']['n']} steps is {result['loss']}")
    return {"batch": setup.batch_size, **contestant.mode, **result}


def _loss(step: Step) -> float:
    """The loss of one more step."""
    phase = getattr(step, "__self__", None)
    if isinstance(phase, Phase):
        phase.meter.totals.zero_()
        step()
        return phase.meter.read()["loss"] or math.nan
    return step().item()


def breakdown_part(size: Size) -> Items:
    """The ECT step by category of kernel: ours, and the compiled baseline for what Inductor does better."""
    setup = Setup(size.network, "ect", 128 // size.step_divisor, size.device, size.compiler)

    def look(step: Step) -> dict[str, Any]:
        return break_down(step, size.device, size.shape_sets[0], setup.batch_size, getattr(torch, size.dtype))

    name = size.backends[0]
    mine = our_contestant(setup, size.dtype, size.compiled)
    yield f"fastcm {name}", partial(measured_step, setup, size, mine, name, look)
    compiled = plain_contestants(setup)["compiled bf16"]
    yield "compiled bf16", partial(measured_step, setup, size, compiled, further=look)


# Batch size, dtype, mode of torch.compile, whole-step CUDA graph: what differs from the first, one thing after the other.
VARIANTS = (
    (128, "bfloat16", "default", "off"),
    (128, "bfloat16", "default", "on"),
    (128, "bfloat16", "max-autotune-no-cudagraphs", "off"),
    (128, "float16", "default", "off"),
    (128, "float16", "default", "on"),
    (512, "bfloat16", "default", "off"),
    (512, "bfloat16", "default", "on"),
    (1024, "bfloat16", "default", "off"),
    (1024, "bfloat16", "default", "on"),
    (1024, "float16", "default", "off"),
)


def compile_modes_part(size: Size) -> Items:
    """Our ECT step by batch size, dtype, mode of torch.compile and whole-step graph."""
    for batch, dtype, mode, graph in VARIANTS:
        setup = Setup(size.network, "ect", batch // size.step_divisor, size.device, size.compiler)
        yield f"{dtype}, {mode}, graph {graph}, batch {batch}", partial(_variant, setup, size, dtype, mode, graph)


def _variant(setup: Setup, size: Size, dtype: str, mode: str, graph: str) -> dict[str, Any]:
    if graph == "on" and size.device.type != "cuda":
        return {"unavailable": f"a device of type {size.device.type} has no CUDA graphs"}
    option = f"compute.cuda_graph='{graph}'"  # YAML: on is true
    try:
        setup.config(dtype, size.compiled, option)
    except ConfigError as error:
        return {"unavailable": str(error)}
    contestant = our_contestant(setup, dtype, size.compiled, option)
    # What torch.compile(mode=...) sets, for a step that takes no mode.
    with torch._inductor.config.patch(torch._inductor.list_mode_options(mode)):
        return measured_step(setup, size, contestant, size.backends[0])
