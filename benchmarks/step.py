"""One training step of EDM and of ECT on the CPU against the plain baseline of ``benchmarks/plain.py``.

    python -m benchmarks.step [--config digits|smoke_cifar10] [--batch-size 64] [--rounds 30] [--json FILE]

Both run in this process in turns, from equal weights, in fp32 and without torch.compile. The figure is the ratio of the
medians, baseline over fastcm: above 1 fastcm is faster. Times of a shared CPU are noisy; only the ratio is meant to travel.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contestants import Setup, ours, plain
from benchmarks.result_file import write_result
from fastcm.train.build import keep_freed_memory

CONFIGS = ("digits", "smoke_cifar10")


def build_steps(name: str, objective: str, batch_size: int) -> dict[str, Callable[[], object]]:
    """The two contestants, with equal weights and the same memory allocator."""
    keep_freed_memory()
    setup = Setup(name, objective, batch_size, torch.device("cpu"))
    return {"plain": plain(setup), "fastcm": ours(setup).step}


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turns after three unmeasured rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for objective in ("edm", "ect"):
        medians = measure(build_steps(arguments.config, objective, arguments.batch_size), arguments.rounds)
        rows.append({"objective": objective.upper(), **medians, "ratio": medians["plain"] / medians["fastcm"]})
        shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items())
        print(f"{objective.upper()}: {shown}, ratio {rows[-1]['ratio']:.2f}")
    if arguments.json:
        options = ("config", "batch_size", "rounds")
        given = {name: getattr(arguments, name) for name in options}
        write_result(arguments.json, "step", given, {"dtype": "float32", "rows": rows})


if __name__ == "__main__":
    main()
