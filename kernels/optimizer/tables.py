"""The tables that let one launch walk many tensors: chunks of all parameters, and addresses."""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from .layout import flat_offsets


@cache
def chunk_table(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Int64[Tensor, "C 4"]:
    """Tensors of these sizes cut into chunks: rows (tensor, first element, number of elements, place in a flat tensor).

    Depends on the sizes alone. A captured CUDA graph reads it by its address, so it is kept as long as the process lives:
    32 bytes for every ``chunk`` elements.
    """
    parts = []
    for tensor, (size, offset) in enumerate(zip(sizes, flat_offsets(sizes)[0], strict=True)):
        start = torch.arange(0, size, chunk)
        parts.append(
            torch.stack([torch.full_like(start, tensor), start, (size - start).clamp(max=chunk), offset + start], dim=1)
        )
    return torch.cat(parts).to(device)


def address_table(tensors: Sequence[Shaped[Tensor, "..."] | None], device: torch.device) -> Int64[Tensor, " A"]:
    """Where the tensors begin, 0 for None.

    The same tensors give the same table without a launch. While a CUDA graph is captured the table is made inside the
    graph, so the graph has its own.
    """
    values = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    if device.type != "cuda":
        return _kept_table(values, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _written_table(values, device)
    return _kept_table(values, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=8)
def _kept_table(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _written_table(values, device)


def _written_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    # The numbers travel as arguments of a few kernels: nothing waits, and a graph can hold them, unlike a copy from the host.
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table
