"""JSON and safetensors files as other projects have them: no header of ours, every error names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Shaped
from pydantic import BaseModel, ValidationError
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.io.atomic import atomic_write
from fastcm.io.tensors import read_safetensors, write_safetensors

Section = TypeVar("Section", bound=BaseModel)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as readable JSON, atomically."""
    atomic_write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, this is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object with named values, found {type(content).__name__}")
    return content


def read_section(path: Path, schema: type[Section], class_name: str) -> Section:
    """A configuration that diffusers wrote for a class of its own, checked against what fastcm can represent.

    Raises CheckpointError naming the first key that is missing, unknown or of a value that fastcm has no counterpart for.
    """
    content = read_json(path)
    if content.get("_class_name") != class_name:
        raise CheckpointError(f"{path}: _class_name is {content.get('_class_name')!r}, expected {class_name!r}")
    known = {
        key: value
        for key, value in content.items()
        if not key.startswith("_") and (value is not None or key in schema.model_fields)
    }
    try:
        return schema.model_validate(known)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        key = ".".join(map(str, error["loc"])) or "the whole file"
        raise CheckpointError(f"{path}: {key} is {error['input']!r}: {error['msg']}") from None


def write_weights(path: Path, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """Write tensors atomically, in row-major order and marked as PyTorch's, as the readers of other projects expect."""
    write_safetensors(path, tensors, {"format": "pt"})


def read_weights(path: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """All tensors of a safetensors file, on the CPU; raises CheckpointError for a missing or damaged file."""
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which fastcm never reads: save the model again as safetensors" if others else ""
        raise CheckpointError(f"{path}: no such file{hint}")
    return read_safetensors(path)
