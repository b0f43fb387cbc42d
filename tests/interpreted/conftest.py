"""Tests of the Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreted.

The variable is read when a kernel is defined, so these tests need a process of their own; without it nothing here is collected.
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Every tensor that a launcher allocates is full of NaN (or of the largest integer), so that what is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def poison(value):
    if value.device.type == "meta" or value.dtype == torch.bool:
        return value
    return value.fill_(torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max)
