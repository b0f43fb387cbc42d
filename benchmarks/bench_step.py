"""Whole training steps under pytest-benchmark: the baselines of ``contestants.py`` and fastcm on each backend.

    pytest benchmarks/bench_step.py --benchmark-json=new.json [--benchmark-compare-fail=median:10%]

On a GPU the network is DDPM++ at batch 128, on a CPU a small one. Times are the host's, the device waited for: right for
steps of milliseconds; kernels are timed by ``fastcm bench kernels``.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.contestants import Setup, Step, backend, ours, plain, tf32
from fastcm.bench.hardware import environment

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NETWORK, BATCH, ROUNDS = ("ddpmpp", 128, 20) if CUDA else ("digits", 16, 5)
DTYPE = "bfloat16" if CUDA else "float32"
WARM_UP = 3

# Name: how the step is made, and the backend and TF32 it runs with.
CONTESTANTS: dict[str, tuple[Callable[[Setup], Step], str, bool]] = {
    "eager-fp32": (plain, "torch", False),
    "fastcm-torch": (lambda setup: ours(setup, DTYPE, CUDA).step, "torch", True),
}
if CUDA:
    CONTESTANTS |= {
        "eager-tf32": (plain, "torch", True),
        "compiled-bf16": (lambda setup: plain(setup, compiled=True), "torch", True),
        "fastcm-triton": (lambda setup: ours(setup, DTYPE, CUDA).step, "triton", True),
    }


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("objective", ["edm", "ect"])
def test_step(benchmark: Callable, objective: str, name: str) -> None:
    """One step, from the batch's numbers to the moved averages."""
    make, kernels, allow_tf32 = CONTESTANTS[name]
    setup = Setup(NETWORK, objective, BATCH, DEVICE)
    with tf32(allow_tf32), backend(kernels):
        step = make(setup)

        def run() -> None:
            step()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.group = f"{objective} {NETWORK} batch {BATCH}"
        benchmark.extra_info.update(environment(DEVICE) | {"batch": BATCH, "network": NETWORK, "dtype": DTYPE})
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARM_UP)
