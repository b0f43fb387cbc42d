"""Where the host may look at values."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def on_cpu(value: Shaped[Tensor, "..."]) -> bool:
    """Whether the host sees values as they are computed, so that a branch on one waits for nothing."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
