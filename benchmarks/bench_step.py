"""Whole training steps under pytest-benchmark: the plain baselines and fastcm on each backend.

    pytest benchmarks/bench_step.py --benchmark-json=new.json [--benchmark-compare-fail=median:10%]

On a GPU the network is DDPM++ at batch 128, on a CPU a small one. Times are the host's, the device waited for: right for
steps of milliseconds; kernels are timed by ``fastcm bench kernels``.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.baselines.contestants import Contestant, Setup, backend, our_contestant, plain_contestants, tf32
from benchmarks.measuring.step_time import WARM_UP
from fastcm.bench.hardware import environment

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NETWORK, BATCH, ROUNDS = ("ddpmpp", 128, 20) if CUDA else ("digits", 16, 5)
DTYPE = "bfloat16" if CUDA else "float32"


def contestants(setup: Setup) -> dict[str, tuple[Contestant, str]]:
    """Each contestant by name, with the backend it runs on; a CPU has no use for TF32, a compiler or Triton."""
    plain = {name: (contestant, "torch") for name, contestant in plain_contestants(setup).items()}
    if not CUDA:
        plain = {"eager fp32": plain["eager fp32"]}
    backends = ("triton", "torch") if CUDA else ("torch",)
    return plain | {f"fastcm {name}": (our_contestant(setup, DTYPE, CUDA), name) for name in backends}


NAMES = tuple(contestants(Setup(NETWORK, "ect", BATCH, DEVICE)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["edm", "ect"])
def test_step(benchmark: Callable, objective: str, name: str) -> None:
    """One step, from the batch's numbers to the moved averages."""
    contestant, kernels = contestants(Setup(NETWORK, objective, BATCH, DEVICE))[name]
    with tf32(contestant.tf32), backend(kernels):
        step = contestant.make()

        def run() -> None:
            step()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.group = f"{objective} {NETWORK} batch {BATCH}"
        benchmark.extra_info.update(environment(DEVICE) | {"batch": BATCH, "network": NETWORK} | contestant.mode)
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARM_UP)
