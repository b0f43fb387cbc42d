"""One training step of EDM and of ECT on the CPU against the plain baseline of ``benchmarks/plain.py``.

    python -m benchmarks.step [--config digits|smoke_cifar10] [--batch-size 64] [--rounds 30] [--json FILE]

Both run in this process in turns, from equal weights, in fp32 and without torch.compile. The figure is the ratio of the
medians, baseline over fastcm: above 1 fastcm is faster. Times of a shared CPU are noisy; only the ratio is meant to travel.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.plain import PlainStep, PlainUNet
from fastcm.config import Config, load_config
from fastcm.data.dataset import ResidentDataset
from fastcm.data.loader import to_unit_range
from fastcm.random import Stream
from fastcm.train.phase import Phase

RESOLUTIONS = {"digits": (8, 1), "smoke_cifar10": (32, 3)}


def random_dataset(resolution: int, channels: int, num: int = 512) -> ResidentDataset:
    """Images of random pixels: the time of a step does not depend on what they show."""
    pixels = Stream(0, "benchmark").integers(torch.arange(num), 256, (resolution, resolution, channels)).to(torch.uint8)
    return ResidentDataset(pixels, None, 0, "random pixels", "random pixels")


def plain_network(config: Config, resolution: int, channels: int) -> PlainUNet:
    """The baseline's network of the same architecture."""
    net = config.network
    return PlainUNet(resolution, channels, net.model_channels, net.channel_mult, net.num_blocks, net.attn_resolutions[0])


def build_steps(name: str, phase: str, batch_size: int) -> dict[str, Callable[[], None]]:
    """The two contestants, with equal weights."""
    resolution, channels = RESOLUTIONS[name]
    simple = [
        f"phases.{p}.{key}" for p in ("pretrain", "tune") for key in (f"batch_size={batch_size}", "dropout=0.0", "augment=0.0")
    ]
    config = load_config(name, [*simple, "data.xflip=false", "phases.tune.objective.q=256", "compute.device=cpu"])
    dataset = random_dataset(resolution, channels)
    ours = Phase(config, phase, dataset, torch.device("cpu"), 0)
    ours.start(None)
    plain = plain_network(config, resolution, channels)
    plain.load_state_dict(ours.model.net.state_dict())
    baseline = PlainStep(plain, to_unit_range(dataset.images).contiguous(), batch_size, config.phases[phase].objective.kind)
    return {"plain": baseline, "fastcm": ours.step}


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
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
    parser.add_argument("--config", choices=RESOLUTIONS, default="digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for phase, objective in (("pretrain", "EDM"), ("tune", "ECT")):
        medians = measure(build_steps(arguments.config, phase, arguments.batch_size), arguments.rounds)
        rows.append({"objective": objective, **medians, "ratio": medians["plain"] / medians["fastcm"]})
        shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians.items())
        print(f"{objective}: {shown}, ratio {rows[-1]['ratio']:.2f}")
    if arguments.json:
        facts = {"config": arguments.config, "batch_size": arguments.batch_size, "torch": torch.__version__}
        facts |= {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
