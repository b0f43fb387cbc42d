"""How large everything in the GPU report is: as on a GPU, or small enough to try every line on a CPU."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

Items = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # of a part: the name of each measurement, and how it is made

# Files with tests marked "gpu", the quick ones first; a test checks that none is missing.
GPU_TESTS = (
    "tests/test_data_loader.py",
    "tests/kernels/test_noise_gpu.py",
    "tests/kernels/test_consistency_loss_gpu.py",
    "tests/kernels/test_optimizer_gpu.py",
    "tests/kernels/test_attention_gpu.py",
    "tests/test_bench_gpu.py",
    "tests/kernels/test_group_norm_gpu.py",
    "tests/test_graphs.py",
    "tests/test_accelerate.py",
    "tests/test_graphed_training.py",
    "tests/test_cli.py",
    "tests/test_edm2.py",
    "tests/test_edm2_training.py",
    "tests/test_likelihood.py",
    "tests/test_objectives.py",
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
