"""What ECT's step gains on the CPU from leaving out the target's rows at the boundary (r = 0), which nobody reads.

    python -m benchmarks.boundary [--config digits|smoke_cifar10] [--batch-size 64] [--q 2] [--rounds 40] [--json FILE]

One phase steps in turns with and without those rows, in its first stage, in fp32 and without torch.compile. The figure is the
ratio of the medians: above 1 leaving them out is faster.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.baselines.contestants import CPU_NETWORKS, NETWORKS, random_dataset
from benchmarks.measuring.in_turns import median_seconds
from benchmarks.measuring.result_file import write_result
from fastcm.config import load_config
from fastcm.train.build import keep_freed_memory
from fastcm.train.phase import Phase


def ect_phase(name: str, batch_size: int, q: float) -> Phase:
    """The tuning phase of a configuration in a first stage that does not end, with fresh weights."""
    settings = {"batch_size": batch_size, "init": "fresh", "objective.q": q, "objective.max_stage": 0}
    options = [f"phases.tune.{key}={value}" for key, value in settings.items()]
    _, resolution, channels = NETWORKS[name]
    device = torch.device("cpu")
    phase = Phase(load_config(name, options), "tune", random_dataset(resolution, channels, device), device, 0)
    phase.start(None)
    return phase


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CPU_NETWORKS, default="digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--q", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    phase = ect_phase(arguments.config, arguments.batch_size, arguments.q)

    def all_rows() -> None:
        with patch("fastcm.objectives.consistency.on_cpu", return_value=False):
            phase.step()

    medians = median_seconds({"all_rows": all_rows, "fastcm": phase.step}, arguments.rounds)
    ratio = medians["all_rows"] / medians["fastcm"]
    print(", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items()) + f", ratio {ratio:.2f}")
    if arguments.json:
        options = {name: getattr(arguments, name) for name in ("config", "batch_size", "q", "rounds")}
        write_result(arguments.json, "boundary", options, {"dtype": "float32", **medians, "ratio": ratio})


if __name__ == "__main__":
    main()
