"""Shared fixtures: one thread per test process, and the command line as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import shape_checks
import torch

shape_checks.install()  # before anything imports fastcm

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """What other tests of the process have compiled would count towards the limit on recompilations."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def run_cli(cwd: Path, *arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run ``fastcm ARGUMENTS`` in a folder, on the CPU, with one thread."""
    return subprocess.run(
        [sys.executable, "-m", "fastcm", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def fastcm_cli(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """The command line, run in an empty folder."""
    return partial(run_cli, tmp_path)
