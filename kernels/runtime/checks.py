"""Checks of kernel arguments: a clear error that names the argument and its value, before anything is launched."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    value: Shaped[Tensor, "..."],
    *,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, where dtype, shape or device are not those wanted."""
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; the kernel takes {known}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device}")


def check_no_tangent(name: str, value: Shaped[Tensor, "..."], instead: str) -> None:
    """Raise ValueError where an argument carries a forward-mode tangent, which a registered op would drop in silence."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{name} has a forward-mode tangent, which the registered op would drop: use {instead}")
