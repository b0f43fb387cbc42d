"""The parts of the GPU report, each a list of items that are measured one after the other in a process of their own.

    python -m benchmarks.gpu.parts PART --lines FILE [--done ITEM]... [--smoke]

Every finished item is one JSON line in FILE at once, so a part that is stopped loses only the item it was at.
"""

import argparse
import gc
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.samplers import peers_part, sampler_part
from benchmarks.gpu.size import FULL, SMOKE, Items, Size
from benchmarks.gpu.steps import breakdown_part, compile_modes_part, step_part
from benchmarks.measuring.result_file import ROOT
from fastcm.bench.cases import DTYPES, OP_PASSES, cases
from fastcm.bench.ceilings import conv_times, copy_bandwidth, product_rate
from fastcm.bench.hardware import environment
from fastcm.bench.measure import FAILED, Settings, measure
from fastcm.bench.report import as_json
from fastcm.bench.shapes import conv_calls
from fastcm.config import load_config
from fastcm.train.build import open_dataset
from fastcm.train.phase import Phase


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
    "kernels": kernels_part,
    "edm-128": partial(step_part, "edm", 128),
    "ect-512": partial(step_part, "ect", 512),
    "edm-512": partial(step_part, "edm", 512),
    "training": training_part,
    "sampler": sampler_part,
    "breakdown": breakdown_part,
    "peers": peers_part,
    "compile-modes": compile_modes_part,
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
