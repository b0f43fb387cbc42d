"""One training step of EDM and of ECT on the CPU against the plain baseline of ``benchmarks/baselines/plain.py``.

    python -m benchmarks.step [--config digits|smoke_cifar10] [--batch-size 64] [--rounds 30] [--json FILE]

Both run in this process in turns, from equal weights, in fp32 and without torch.compile. The figure is the ratio of the
medians, baseline over fastcm: above 1 fastcm is faster. Times of a shared CPU are noisy; only the ratio is meant to travel.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.baselines.contestants import CPU_NETWORKS, Setup, ours, plain
from benchmarks.measuring.in_turns import median_seconds
from benchmarks.measuring.result_file import write_result
from fastcm.train.build import keep_freed_memory


def build_steps(name: str, objective: str, batch_size: int) -> dict[str, Callable[[], object]]:
    """The two contestants, with equal weights and the same memory allocator."""
    keep_freed_memory()
    setup = Setup(name, objective, batch_size, torch.device("cpu"))
    return {"plain": plain(setup), "fastcm": ours(setup).step}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CPU_NETWORKS, default="digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for objective in ("edm", "ect"):
        medians = median_seconds(build_steps(arguments.config, objective, arguments.batch_size), arguments.rounds)
        rows.append({"objective": objective.upper(), **medians, "ratio": medians["plain"] / medians["fastcm"]})
        shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items())
        print(f"{objective.upper()}: {shown}, ratio {rows[-1]['ratio']:.2f}")
    if arguments.json:
        options = ("config", "batch_size", "rounds")
        given = {name: getattr(arguments, name) for name in options}
        write_result(arguments.json, "step", given, {"dtype": "float32", "rows": rows})


if __name__ == "__main__":
    main()
