"""Shared fixtures: one thread per test process, and the command line as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def fastcm_cli(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run ``fastcm ARGUMENTS`` in an empty folder, with warnings as errors of our own modules shown on stderr."""

    def run(*arguments: str, cwd: Path = tmp_path, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "fastcm", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
