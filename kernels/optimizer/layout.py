"""One flat tensor [P] for all parameters: moments, averages and low-precision copies lie in one piece of memory each.

A parameter takes its elements in the order of its memory, whatever that order is (channels_last, transposed), so that a
kernel walks parameter, gradient and state side by side without looking at shapes. Every part begins at a multiple of
``ALIGNMENT`` elements; what lies between the parts belongs to nobody.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# 128 bytes of a two-byte type: a part begins on a line of the cache.
ALIGNMENT = 64


class FlatLayout:
    """Where each named parameter lies in a flat tensor [P].

    Raises ValueError where there is no parameter, or one that is not dense in memory (a slice, an expanded tensor).
    """

    def __init__(self, params: Mapping[str, Float[Tensor, "..."]]) -> None:
        if not params:
            raise ValueError("params is empty; an optimizer needs at least one parameter")
        for name, p in params.items():
            if not is_dense(p):
                raise ValueError(f"params[{name!r}] has strides {p.stride()} for shape {tuple(p.shape)}; expected dense memory")
        self.names = list(params)
        self.forms = [(p.shape, p.stride()) for p in params.values()]
        self.offsets, self.num_elements = flat_offsets([p.numel() for p in params.values()])

    def zeros(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Float[Tensor, " P"]:
        """A flat tensor of zeros."""
        return torch.zeros(self.num_elements, device=device, dtype=dtype)

    def views(self, flat_P: Shaped[Tensor, " P"]) -> dict[str, Shaped[Tensor, "..."]]:
        """The parts of a flat tensor by parameter name, with the shapes and strides of the parameters."""
        parts = zip(self.names, self.forms, self.offsets, strict=True)
        return {name: flat_P.as_strided(shape, stride, offset) for name, (shape, stride), offset in parts}

    @torch.no_grad()
    def flatten(
        self, tensors: Sequence[Float[Tensor, "..."] | None], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, " P"]:
        """The tensors, shaped like the parameters and in any memory, in one flat tensor; zero where there is None."""
        device = next(value.device for value in tensors if value is not None)
        flat_P = self.zeros(device, dtype)
        copy_present(list(self.views(flat_P).values()), tensors)
        return flat_P


def flat_offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin, and the size P of the whole."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def flat_views(params: Sequence[Shaped[Tensor, "..."]], flat_P: Shaped[Tensor, " P"]) -> list[Shaped[Tensor, "..."]]:
    """The part of a flat tensor for each parameter, with its shape and strides."""
    offsets, _ = flat_offsets([p.numel() for p in params])
    return [flat_P.as_strided(p.shape, p.stride(), offset) for p, offset in zip(params, offsets, strict=True)]


def copy_present(targets: Sequence[Shaped[Tensor, "..."]], values: Sequence[Shaped[Tensor, "..."] | None]) -> None:
    """Copy the values that are not None into their targets."""
    pairs = [(target, value) for target, value in zip(targets, values, strict=True) if value is not None]
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


def is_dense(value: Shaped[Tensor, "..."]) -> bool:
    """Whether the elements fill one piece of memory, each once, in some order of the axes."""
    axes = sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1)
    expected = 1
    for stride, size in axes:
        if stride != expected and value.numel():
            return False
        expected *= size
    return True


def same_order(value: Shaped[Tensor, "..."], other: Shaped[Tensor, "..."]) -> bool:
    """Whether two tensors of one shape have their elements in the same order; strides of axes of size 1 say nothing."""
    if value.stride() == other.stride():
        return True
    return all(a == b for size, a, b in zip(value.shape, value.stride(), other.stride(), strict=True) if size != 1)
