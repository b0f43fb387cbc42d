"""Sets of weights in files of other projects, and what the file says of the one that is chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.io.tensors import HEADER_KEY, read_metadata, read_safetensors
from fastcm.io.torch_files import find_modules, module_state, read_checkpoint
from fastcm.passive_pickle import Record

AVERAGES = ("ema", "ema_state")  # where training states keep {"stds": [...], "emas": [...]}
EXTRA = "loss_fn"  # tells ECT's networks from EDM2's


@dataclass(frozen=True)
class Weights:
    """A set of weights: tensors under official names, and the object they were part of where the file has one.

    name         its key in the file, "" for a file that is nothing else
    class_name   of the object around the network, "" for a bare state dict
    attributes   of that object, and the arguments it was constructed with
    loss         class of the loss that was saved beside it
    unused       what else the file holds
    """

    state: dict[str, Tensor]
    name: str = ""
    class_name: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    loss: str = ""
    unused: tuple[str, ...] = ()


def read_source(path: Path, wanted: str | None) -> Weights:
    """The set of weights in a .pkl, .pt or safetensors file that ``wanted`` names, by default its average.

    Raises CheckpointError for a file that is damaged or hostile, holds no weights, several sets or none of that name, or
    has a tensor that is not finite or not of floats.
    """
    if is_safetensors(path):
        content: Any = _read_safetensors(path)
    else:
        content = read_checkpoint(path)
    weights = _chosen(content, wanted)
    for name, value in weights.state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{name} is of {str(value.dtype).removeprefix('torch.')}, but all weights are floats")
        if value.element_size() < 2:
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is of {kind}; expected weights of 16, 32 or 64 bits")
        if not value.isfinite().all():
            kind = "NaN" if value.isnan().any() else "infinite"
            raise CheckpointError(f"{name} has values that are {kind}; the training that made this file had failed")
    return weights


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[5:8] == b"\0\0\0"


def _read_safetensors(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    if HEADER_KEY in read_metadata(path):
        raise CheckpointError("it is a bundle of fastcm already: there is nothing to convert; load it as it is")
    return read_safetensors(path)


def _chosen(content: Any, wanted: str | None) -> Weights:
    """The set of weights that is meant among those found."""
    found = _candidates(content)
    if not found:
        raise CheckpointError(f"it holds no network and no state dict, but {_kinds(content)}")
    averages = [name for name in found if name.split()[:1] == ["ema"]]
    if wanted is None:
        meant = averages or [name for name in found if name in ("net", "")] or list(found)
    else:
        meant = averages if wanted == "ema" else [name for name in found if name.removeprefix("ema ") == wanted]
    if len(meant) != 1:
        known = ", ".join(name.removeprefix("ema ") or "(one without a name)" for name in found)
        what = f"no weights '{wanted}'" if not meant else "several sets of weights"
        raise CheckpointError(f"it has {what}; choose one with --weights: {known}")
    return found[meant[0]]()


def _candidates(content: Any) -> dict[str, Callable[[], Weights]]:
    """Every set of weights in a file by name; each is read out only when it is asked for."""
    if _is_state(content):
        return {"": lambda: Weights(dict(content))}
    found = {name: _of_module(content, name, record) for name, record in find_modules(content).items()}
    if not isinstance(content, dict):
        return found
    for name, value in content.items():
        if isinstance(name, str) and _is_state(value):
            found[name] = _of_state(content, name, value)
        elif name in AVERAGES and _is_averages(value):
            pairs = zip(value["stds"], value["emas"], strict=True)
            found |= {f"ema {std:g}": _of_state(content, name, state) for std, state in pairs}
    return found


def _of_module(content: Any, name: str, record: Record) -> Callable[[], Weights]:
    def read() -> Weights:
        return Weights(module_state(record), name, record.name, _attributes(record), _loss(content), _unused(content, name))

    return read


def _of_state(content: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> Callable[[], Weights]:
    """A state dict beside a whole module is one of that module."""

    def read() -> Weights:
        beside = find_modules(content).get("net")
        known = (beside.name, _attributes(beside)) if beside else ("", {})
        return Weights(dict(state), name, *known, _loss(content), _unused(content, name))

    return read


def _is_state(value: Any) -> bool:
    """Whether it is a state dict: tensors only, by name."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _is_averages(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    stds, emas = value.get("stds"), value.get("emas")
    lists = isinstance(stds, list | tuple) and isinstance(emas, list | tuple) and len(stds) == len(emas)
    return lists and all(isinstance(std, float) for std in stds) and all(map(_is_state, emas))


def _attributes(record: Record) -> dict[str, Any]:
    """The arguments an object was constructed with, and its attributes, which count where both have a name."""
    state = record.state if isinstance(record.state, dict) else {}
    arguments = state.get("_init_kwargs")
    attributes = {name: value for name, value in state.items() if isinstance(name, str) and not name.startswith("_")}
    return {**(arguments if isinstance(arguments, dict) else {}), **attributes}


def _loss(content: Any) -> str:
    loss = content.get(EXTRA) if isinstance(content, dict) else None
    return loss.name if isinstance(loss, Record) else ""


def _unused(content: Any, name: str) -> tuple[str, ...]:
    return tuple(str(key) for key in content if key != name) if isinstance(content, dict) else ()


def _kinds(content: Any) -> str:
    """What a file holds that is no weights."""
    if isinstance(content, dict) and {"state", "param_groups"} <= content.keys():
        return "the state of an optimizer; give the file of the model"
    if isinstance(content, dict):
        return f"a dict with {', '.join(repr(key) for key in list(content)[:5]) or 'nothing in it'}"
    return f"a {content.name if isinstance(content, Record) else type(content).__name__}"


def dtypes(state: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, int]:
    """How many tensors a state dict has of each dtype, the most frequent first."""
    names = [str(value.dtype).removeprefix("torch.") for value in state.values()]
    return {name: names.count(name) for name in sorted(set(names), key=names.count, reverse=True)}


def as_float32(state: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Shaped[Tensor, "..."]]:
    """The state dict in fp32."""
    return {name: value.to(torch.float32) for name, value in state.items()}
