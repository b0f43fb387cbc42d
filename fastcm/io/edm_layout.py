"""State dicts of the official EDM networks (arXiv 2206.00364) to and from those of ``fastcm.nn.UNet``.

Names and shapes agree except in two places. Official attention interleaves q, k and v: row (h D + c) 3 + {q, k, v} of
qkv is channel c of head h; ours are ordered (3, heads, D). And official resampling layers store their filter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.nn.blocks import Block
from fastcm.nn.layers import Conv, Resample
from fastcm.nn.unet import UNet

_FILTER = "resample_filter"


def from_edm(state: Mapping[str, Tensor], unet: UNet, *, drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What ``unet.load_state_dict`` takes, from a state dict under official names (without the leading "model.").

    Neither ``state`` nor ``unet`` is changed; values keep their dtype. ``drop`` lists prefixes of entries to leave out
    on purpose, such as "map_augment." where a network is tuned without augmentation labels.
    Raises CheckpointError naming the key that is missing, unknown or of another shape, or a filter of another family.
    """
    state = {name: value for name, value in state.items() if not name.startswith(drop)}
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    filters = _filters(unet)
    _check(state, expected | {name: value.shape for name, value in filters.items()})
    for name, value in filters.items():
        if not torch.allclose(state[name].to("cpu", value.dtype), value):
            raise CheckpointError(f"{name} is not the filter this network resamples with: the checkpoint is of another family")
    heads = _attention_heads(unet)
    return {name: _to_major(state[name], heads[name]) if name in heads else state[name] for name in expected}


def to_edm(state: Mapping[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The official state dict (without the leading "model.") with the values of ``state``, a state dict of ``unet``.

    Raises CheckpointError naming the key that is missing, unknown or of another shape.
    """
    _check(state, {name: value.shape for name, value in unet.state_dict().items()})
    heads = _attention_heads(unet)
    official = {name: _to_interleaved(value, heads[name]) if name in heads else value for name, value in state.items()}
    return official | _filters(unet)


def _attention_heads(unet: UNet) -> dict[str, int]:
    """Number of heads by name of each qkv parameter."""
    blocks = {name: block.num_heads for name, block in unet.named_modules() if isinstance(block, Block) and block.num_heads}
    return {f"{name}.qkv.{leaf}": heads for name, heads in blocks.items() for leaf in ("weight", "bias")}


def _to_major(rows: Tensor, num_heads: int) -> Tensor:
    """Rows ordered (heads, D, 3) to (3, heads, D)."""
    return rows.unflatten(0, (num_heads, -1, 3)).movedim(2, 0).flatten(0, 2)


def _to_interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """Rows ordered (3, heads, D) to (heads, D, 3)."""
    return rows.unflatten(0, (3, num_heads, -1)).movedim(0, 2).flatten(0, 2)


def _filters(unet: UNet) -> dict[str, Tensor]:
    """The filter buffers of the official network by name: [1, 1, K, K], the outer product with sum 1."""
    taps = {}
    for name, module in unet.named_modules(remove_duplicate=False):
        if isinstance(module, Conv) and module.resample is not None:
            taps[f"{name}.{_FILTER}"] = module.resample.filter
        elif isinstance(module, Resample) and not name.endswith(".resample"):
            taps[f"{name}.{_FILTER}"] = module.filter
    return {name: _outer(torch.tensor(filter, dtype=torch.float32)) for name, filter in taps.items()}


def _outer(taps_K: Tensor) -> Tensor:
    return (torch.outer(taps_K, taps_K) / taps_K.sum().square())[None, None]


def _check(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
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
