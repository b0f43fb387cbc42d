"""What all layouts of foreign state dicts share: the check of names and shapes, and the order of q, k and v."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fastcm.errors import CheckpointError


def check_state(state: Mapping[str, Float[Tensor, "..."]], expected: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError naming what ``state`` lacks, has beyond ``expected`` or has in another shape."""
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_list(missing)}, which this network has; check the network's options")
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise CheckpointError(f"the checkpoint has {_list(unknown)}, which this network lacks; check the network's options")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, but this network needs {tuple(shape)}")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def to_major(rows: Float[Tensor, "R ..."], num_heads: int) -> Float[Tensor, "R ..."]:
    """Rows ordered (heads, D, 3), as EDM and EDM2 have q, k and v, to (3, heads, D), as ours are."""
    return rows.unflatten(0, (num_heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def to_interleaved(rows: Float[Tensor, "R ..."], num_heads: int) -> Float[Tensor, "R ..."]:
    """Rows ordered (3, heads, D) to (heads, D, 3)."""
    return rows.unflatten(0, (3, num_heads, -1)).movedim(0, 2).flatten(0, 2)
