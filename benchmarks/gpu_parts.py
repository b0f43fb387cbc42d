"""The parts of the GPU report, each a list of items that are measured one after the other in a process of their own.

    python -m benchmarks.gpu_parts PART --lines FILE [--done ITEM]... [--smoke]

Every finished item is one JSON line in FILE at once, so a part that is stopped loses only the item it was at.
"""

import argparse
import gc
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.breakdown import break_down
from benchmarks.contestants import Setup, Step, backend, ours, plain, tf32
from benchmarks.step_time import count_kernels, measure_step
from fastcm.bench.cases import DTYPES, OP_PASSES, cases
from fastcm.bench.ceilings import conv_times, copy_bandwidth, cudnn_search, product_rate
from fastcm.bench.hardware import environment
from fastcm.bench.measure import FAILED, Settings, measure
from fastcm.bench.report import as_json
from fastcm.bench.shapes import conv_calls
from fastcm.bench.timing import time_host
from fastcm.config import load_config
from fastcm.sampling import sample
from fastcm.train.build import open_dataset
from fastcm.train.phase import Phase

ROOT = Path(__file__).parent.parent
Items = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


# Files with tests marked "gpu", the quick ones first; a test checks that none is missing.
GPU_TESTS = (
    "tests/test_data_loader.py",
    "tests/kernels/test_noise_gpu.py",
    "tests/kernels/test_consistency_loss_gpu.py",
    "tests/kernels/test_optimizer_gpu.py",
    "tests/kernels/test_attention_gpu.py",
    "tests/test_bench_gpu.py",
    "tests/kernels/test_group_norm_gpu.py",
    "tests/test_edm2.py",
    "tests/test_edm2_training.py",
    "tests/test_likelihood.py",
)


class Size(NamedTuple):
    """How large everything is: as on a GPU, or small enough to try every line on a CPU."""

    device: torch.device
    network: str
    shape_sets: tuple[str, ...]
    batch: int
    conv_batch: int
    budget_s: float
    step_s: float
    step_divisor: int
    samples: tuple[int, ...]
    training_steps: int
    tests: tuple[str, ...]
    test_options: tuple[str, ...]
    backends: tuple[str, ...]
    kernel_backends: tuple[str, ...]
    compiler: str
    compiled: bool
    dtype: str


FULL = Size(
    *(torch.device("cuda"), "ddpmpp", ("ddpmpp32", "adm64"), 128, 128, 0.02, 3.0, 1, (1, 256), 200),
    tests=GPU_TESTS,
    test_options=("-m", "gpu"),
    backends=("triton", "torch"),
    kernel_backends=("triton", "torch", "fused", "apex", "xformers", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math"),
    compiler="inductor",
    compiled=True,
    dtype="bfloat16",
)
SMOKE = Size(
    *(torch.device("cpu"), "digits", ("digits8",), 2, 1, 0.001, 0.01, 64, (1, 4), 20),
    tests=("tests/quality/test_forbidden_calls.py",),
    test_options=("-k", "noticed"),
    backends=("torch",),
    kernel_backends=("torch", "fused"),
    compiler="aot_eager",
    compiled=False,
    dtype="float32",
)


def environment_part(size: Size) -> Items:
    """What everything else was measured on."""
    yield "environment", partial(environment, size.device)


def ceilings_part(size: Size) -> Items:
    """Copy, matrix product, and cuDNN on every distinct convolution of the networks."""
    yield "copy", lambda: {"bytes_per_s": copy_bandwidth(size.device)}
    yield "matmul bf16", lambda: {"flops_per_s": product_rate(size.device, budget_s=size.budget_s)}
    for name in size.shape_sets:
        yield f"conv {name}", partial(_convolutions, name, size)


def _convolutions(shape_set: str, size: Size) -> dict[str, Any]:
    """Each convolution, and what all of one forward pass and of its gradients take."""
    rows, totals = [], dict.fromkeys(("fprop", "dgrad", "wgrad"), 0.0)
    flops = 0
    for shape, calls in conv_calls(shape_set).items():
        times = conv_times(shape, size.conv_batch, size.device, size.budget_s)
        rows.append({**shape._asdict(), "calls": calls, **times})
        flops += calls * shape.flops_per_image * size.conv_batch
        for name in totals:
            totals[name] += calls * times[name]["time"]["median_us"] / 1e3
    rates = {f"{name}_flops_per_s": flops / (ms * 1e-3) for name, ms in totals.items()}
    sums = {f"{name}_ms": ms for name, ms in totals.items()}
    return {"batch": size.conv_batch, "flops": flops, **sums, **rates, "rows": rows}


def correctness_part(size: Size) -> Items:
    """The tests that need a GPU, file by file, so that a part that runs out of time keeps what it has."""
    for path in size.tests:
        yield path, partial(_pytest, (path, *size.test_options))


def _pytest(arguments: tuple[str, ...]) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: " + " | ".join(lines[-15:]))
    return {"summary": lines[-1]}


def kernels_part(size: Size) -> Items:
    """Every kernel at every shape; torch.compile, which takes seconds a shape, after all others and shape by shape."""
    for name in size.shape_sets:
        for op, directions in OP_PASSES.items():
            for direction in directions:
                chosen = list(cases(op, name, size.batch, DTYPES["bf16"], (direction,)))
                yield f"{name} {op} {direction}", partial(_kernels, chosen, size, size.kernel_backends)
    if size.compiled:
        for name in size.shape_sets:
            for op in ("group_norm", "attention", "consistency_loss", "add_noise"):
                for case in cases(op, name, size.batch, DTYPES["bf16"], OP_PASSES[op]):
                    yield f"{name} {op} {case.direction} {case.label}, compile", partial(_kernels, [case], size, ("compile",))


def _kernels(chosen: list[Any], size: Size, wanted: tuple[str, ...]) -> dict[str, Any]:
    copy = _copy(size.device)
    result = measure(chosen, Settings(size.device, size.budget_s, wanted), copy_bytes_per_s=copy)
    failed = sum(row["status"] == FAILED for row in result["rows"])
    return {"copy_bytes_per_s": copy, "failed": failed, "rows": result["rows"]}


_copy = cache(copy_bandwidth)  # once per process


def step_part(objective: str, batch_size: int, size: Size) -> Items:
    """One training step of the network: literal PyTorch, the compiled baseline, ours with each backend."""
    setup = Setup(size.network, objective, batch_size // size.step_divisor, size.device, size.compiler)
    # Ours first: what a part that runs out of time has not measured should be a baseline.
    for name in size.backends:
        yield f"fastcm {name}", partial(_step, setup, size, lambda: ours(setup, size.dtype, size.compiled).step, True, name)
    yield "compiled bf16", partial(_step, setup, size, lambda: plain(setup, compiled=True), True)
    for precision, allowed in (("fp32", False), ("tf32", True)):
        yield f"eager {precision}", partial(_step, setup, size, lambda: plain(setup), allowed)


def _step(
    setup: Setup,
    size: Size,
    make: Callable[[], Step],
    allow_tf32: bool,
    kernels: str = "torch",
    further: Callable[[Step], dict[str, Any]] = lambda step: {},
) -> dict[str, Any]:
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
    yield f"fastcm {name}", partial(_step, setup, size, lambda: ours(setup, size.dtype, size.compiled).step, True, name, look)
    yield "compiled bf16", partial(_step, setup, size, lambda: plain(setup, compiled=True), True, further=look)


def sampler_part(size: Size) -> Items:
    """One and two steps of the network, a single image and a batch."""
    for name in size.backends:
        for num in size.samples:
            for steps in (1, 2):
                yield f"fastcm {name}, {steps} steps, batch {num}", partial(_sample, size, name, num, steps)


@cache
def _sampling_model(size: Size) -> Any:
    return ours(Setup(size.network, "ect", 4, size.device), size.dtype).sampling_model()


def _sample(size: Size, name: str, num: int, steps: int) -> dict[str, Any]:
    def draw() -> None:
        sample(_sampling_model(size), num, steps, batch_size=num)
        if size.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), tf32(True), cudnn_search(), backend(name):
        draw()
        timing = time_host([draw], size.step_s / 4)
        kernels = count_kernels(draw, size.device)
    return {"batch": num, "steps": steps, "images_per_s": num / (timing.median_us * 1e-6), "call": timing._asdict(), **kernels}


def training_part(size: Size) -> Items:
    """The embedded digits pretrained and tuned for a moment: do losses stay finite and does the first one fall?"""
    yield "digits", partial(_train, size)


def _train(size: Size) -> dict[str, Any]:
    options = (f"compute.dtype={size.dtype}", f"compute.device={size.device.type}")
    config = load_config("digits", [*options, f"compute.compile='{'on' if size.compiled else 'off'}'"])
    data = open_dataset(config.data, size.device)
    losses, previous, first_image = {}, None, 0
    for name in config.phases:
        phase = Phase(config, name, data, size.device, first_image)
        phase.start(previous)
        losses[name] = _train_phase(phase, size.training_steps)
        previous, first_image = phase.averaged_weights(), first_image + phase.images
    if not all(loss is not None and math.isfinite(loss) for values in losses.values() for loss in values):
        raise RuntimeError(f"a loss is not finite: {losses}")
    if losses["pretrain"][-1] >= losses["pretrain"][0]:
        raise RuntimeError(f"the pretraining loss does not fall: {losses['pretrain']}")
    return {"steps_per_loss": size.training_steps // 4, "losses": losses}


def _train_phase(phase: Phase, num_steps: int) -> list[float | None]:
    """Mean losses of the four quarters."""
    losses = []
    for _ in range(4):
        for _ in range(num_steps // 4):
            phase.step()
        losses.append(phase.meter.read()["loss"])
    return losses


PARTS: dict[str, Callable[[Size], Items]] = {
    "environment": environment_part,
    "ceilings": ceilings_part,
    "correctness": correctness_part,
    "ect-128": partial(step_part, "ect", 128),
    "breakdown": breakdown_part,
    "kernels": kernels_part,
    "edm-128": partial(step_part, "edm", 128),
    "ect-512": partial(step_part, "ect", 512),
    "edm-512": partial(step_part, "edm", 512),
    "sampler": sampler_part,
    "training": training_part,
}


def run_part(name: str, size: Size, done: set[str], write: Callable[[dict[str, Any]], None]) -> None:
    """Measure the items of a part that are not done; an item that fails is written with its error, the rest goes on."""
    for item, work in PARTS[name](size):
        if item in done:
            continue
        start = time.perf_counter()
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"}
        write({"item": item, "seconds": time.perf_counter() - start, **result})
        gc.collect()
        if size.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--done", action="append", default=[])
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    with arguments.lines.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(as_json(line) + "\n")
            file.flush()

        run_part(arguments.part, SMOKE if arguments.smoke else FULL, set(arguments.done), write)


if __name__ == "__main__":
    main()
