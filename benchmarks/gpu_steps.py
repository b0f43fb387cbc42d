"""The parts of the GPU report that measure whole training steps of ours and of the plain baselines."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._inductor

from benchmarks.breakdown import break_down
from benchmarks.contestants import Setup, Step, backend, ours, plain, tf32
from benchmarks.gpu_size import Items, Size
from benchmarks.step_time import measure_step
from fastcm.bench.ceilings import cudnn_search
from fastcm.errors import ConfigError
from fastcm.train.phase import Phase


def step_part(objective: str, batch_size: int, size: Size) -> Items:
    """One training step of the network: literal PyTorch, the compiled baseline, ours with each backend."""
    setup = Setup(size.network, objective, batch_size // size.step_divisor, size.device, size.compiler)
    # Ours first: what a part that runs out of time has not measured should be a baseline.
    for name in size.backends:
        yield (
            f"fastcm {name}",
            partial(measured_step, setup, size, lambda: ours(setup, size.dtype, size.compiled).step, True, name),
        )
    yield "compiled bf16", partial(measured_step, setup, size, lambda: plain(setup, compiled=True), True)
    for precision, allowed in (("fp32", False), ("tf32", True)):
        yield f"eager {precision}", partial(measured_step, setup, size, lambda: plain(setup), allowed)


def measured_step(
    setup: Setup,
    size: Size,
    make: Callable[[], Step],
    allow_tf32: bool,
    kernels: str = "torch",
    further: Callable[[Step], dict[str, Any]] = lambda step: {},
) -> dict[str, Any]:
    """Time, memory, launches and loss of a step on one backend of the kernels, and what ``further`` finds out about it."""
    torch.compiler.reset()
    with tf32(allow_tf32), cudnn_search(), backend(kernels):
        step = make()
        result = measure_step(step, setup.batch_size, setup.device, size.step_s)
        result |= {"loss": _loss(step), **further(step)}
    if not math.isfinite(result["loss"]):
        raise RuntimeError(f"the loss after {result['step_ms']['n']} steps is {result['loss']}")
    return {"batch": setup.batch_size, **result}


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
    yield (
        f"fastcm {name}",
        partial(measured_step, setup, size, lambda: ours(setup, size.dtype, size.compiled).step, True, name, look),
    )
    yield "compiled bf16", partial(measured_step, setup, size, lambda: plain(setup, compiled=True), True, further=look)


# Batch size, dtype, mode of torch.compile, whole-step CUDA graph: what differs from the first, one thing after the other.
VARIANTS = (
    (128, "bfloat16", "default", "off"),
    (128, "bfloat16", "default", "on"),
    (128, "bfloat16", "max-autotune-no-cudagraphs", "off"),
    (128, "float16", "default", "off"),
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
    # What torch.compile(mode=...) sets, for a step that takes no mode.
    with torch._inductor.config.patch(torch._inductor.list_mode_options(mode)):
        return measured_step(setup, size, lambda: ours(setup, dtype, size.compiled, option).step, True, size.backends[0])
