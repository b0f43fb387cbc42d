"""Checkpoints of EDM, EDM2, ECT, OpenAI and CTM, read without executing anything.

They are plain pickles, zip files of ``torch.save``, or its files from before torch 1.6. All are read here byte by byte: tensors
come out on the CPU in their own dtype, modules as passive records (``fastcm.passive_pickle``). EDM's pickles carry the source
text of their classes (``torch_utils.persistence``); it is dropped.
"""

import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastcm.errors import CheckpointError
from fastcm.passive_pickle import PLAIN, Names, Record, UnpicklingError, Window, read_pickle

MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a torch file from before torch 1.6
MAGIC_BYTES = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
PROTOCOL = 1001  # its second value
LIMIT = 1 << 48  # of sizes, strides and offsets; products with a few bytes stay below 2^63
MAX_DIMENSIONS = 64
MAX_PARTS, MAX_DEPTH, MAX_NAME = 100_000, 100, 200  # of a tree of modules

# How files begin that are often taken for checkpoints.
MISTAKEN = {
    rb"version https://git-lfs": "it is a Git LFS pointer, not the file itself; run `git lfs pull` or download the file",
    rb"\s*<": "it is a web page, not a checkpoint; the download failed, check the link",
    rb".{4}\0{4}\{": "it is a safetensors file, which is no pickle",
    rb"\x1f\x8b|BZh|\xfd7zXZ": "it is compressed; unpack it first",
    rb"\x89HDF": "it is an HDF5 file, not a torch checkpoint",
}


def read_checkpoint(path: Path) -> Any:
    """The content of a plain pickle, a torch zip file or an old torch file.

    Tensors are on the CPU, share storages as they did when saved, and need no gradient. Objects are ``Record``s, dicts with
    attribute access are dicts. Raises CheckpointError naming the file and what is wrong or was refused; no code of the file
    is run, no module is imported, and what a damaged file claims is not allocated.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint (.pkl, .pt or .pth)")
    try:
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def find_modules(content: Any) -> dict[str, Record]:
    """The modules at the top of a checkpoint by key, such as "ema" or "net"; a module that is the whole content has key ""."""
    entries = content if isinstance(content, dict) else {"": content}
    return {name: value for name, value in entries.items() if isinstance(name, str) and _is_module(value)}


def module_state(record: Record) -> dict[str, Tensor]:
    """The state dict of a module's record: parameters and persistent buffers by dotted name, in torch's order.

    Raises CheckpointError naming the part that is no module, holds no tensor where one belongs, or contains itself.
    """
    state = {}
    for prefix, part in _parts(record):
        passing = part.state.get("_non_persistent_buffers_set") or ()
        buffers = {name: value for name, value in _table(part, "_buffers", prefix).items() if name not in passing}
        for name, value in (_table(part, "_parameters", prefix) | buffers).items():
            if value is not None and not isinstance(value, Tensor):
                raise CheckpointError(f"{prefix}{name} is a {type(value).__name__}, expected a tensor")
            if value is not None:
                state[prefix + name] = value
    return state


def module_arguments(record: Record) -> dict[str, Any]:
    """The keyword arguments that a persistent object was constructed with.

    Positional ones are in ``record.state["_init_args"]``. Raises CheckpointError if none were recorded.
    """
    arguments = record.state.get("_init_kwargs") if isinstance(record.state, dict) else None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{record.name} was saved without its constructor's arguments")
    return dict(arguments)


def _is_module(value: Any) -> bool:
    return isinstance(value, Record) and isinstance(value.state, dict) and "_modules" in value.state


def _parts(record: Record) -> Iterator[tuple[str, Record]]:
    """A module and all modules in it with their prefixes, depth first."""
    pending, count = [("", record, 0)], 0
    while pending:
        prefix, part, depth = pending.pop()
        count += 1
        if count > MAX_PARTS or depth > MAX_DEPTH:
            raise CheckpointError(f"{record.name} has too many parts within parts; does it contain itself?")
        if not _is_module(part):
            raise CheckpointError(f"{prefix or 'the content '}is no module")
        yield prefix, part
        children = _table(part, "_modules", prefix).items()
        pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children) if child is not None]


def _table(part: Record, name: str, prefix: str) -> dict[str, Any]:
    table = part.state.get(name)
    if not isinstance(table, dict) or not all(isinstance(key, str) and 0 < len(key) <= MAX_NAME for key in table):
        raise CheckpointError(f"{prefix}{name} is no dict with names")
    return table


def _read(file: BinaryIO, size: int) -> Any:
    start = file.read(64)
    file.seek(0)
    if not start:
        raise UnpicklingError("it is empty (0 bytes); was the download or the save interrupted?")
    for pattern, meaning in MISTAKEN.items():
        if re.match(pattern, start, re.DOTALL):
            raise UnpicklingError(meaning)
    if start.startswith(b"PK"):
        return _read_zip(file, size)
    if start[2:14] == MAGIC_BYTES:
        return _read_legacy(Window(file, size), _NAMES)
    return read_pickle(Window(file, size), _NAMES)


@dataclass(frozen=True, eq=False)
class _StorageType:
    """What a name such as torch.HalfStorage stands for."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    """Raw bytes that tensors share."""

    flat: Tensor
    dtype: torch.dtype


def _read_zip(file: BinaryIO, size: int) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, size)
    except UnpicklingError:
        raise
    # zipfile fails in many ways on damaged files.
    except Exception as error:
        raise UnpicklingError(f"it is a damaged or truncated zip file: {type(error).__name__}: {str(error)[:200]}") from error


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    members = {member.filename: member for member in archive.infolist()}
    folders = [name.removesuffix("data.pkl") for name in members if re.fullmatch("[^/]+/data.pkl", name)]
    if len(folders) != 1:
        raise UnpicklingError("it is a zip file, but none of torch.save: there must be one data.pkl in it")
    folder = folders[0]
    if f"{folder}constants.pkl" in members:
        raise UnpicklingError("it is a TorchScript program, not a checkpoint; save the state dict instead")
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UnpicklingError(f"{member.filename!a} in it is compressed, which torch.save never does")
    if sum(member.file_size for member in archive.infolist()) > size:
        raise UnpicklingError("its members claim more bytes than the file has")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
        raise UnpicklingError("it was saved on a big-endian machine; save it again on another one")
    storages: dict[str, Tensor] = {}

    def load(key: str, claimed: int, _: int) -> Tensor:
        name = f"{folder}data/{key}"
        if name not in members or members[name].file_size != claimed:
            found = f"{members[name].file_size} bytes" if name in members else "nothing"
            raise UnpicklingError(f"a tensor claims {claimed} bytes in {name!a}, but there is {found}")
        if key not in storages:
            storages[key] = torch.empty(claimed, dtype=torch.uint8)
            with archive.open(members[name]) as content:
                _fill(storages[key], Window(content, claimed), name)
        return storages[key]

    content = archive.read(f"{folder}data.pkl")
    return read_pickle(Window(io.BytesIO(content), len(content)), _NAMES, partial(_persistent_id, load))


def _fill(storage: Tensor, window: Window, name: str) -> None:
    if not window.readinto(memoryview(storage.numpy())):
        raise UnpicklingError(f"it is truncated: the storage {name!a} lacks bytes")


def _read_legacy(window: Window, names: Names) -> Any:
    """Magic number, protocol, system, content, keys of storages, then each storage as its length and its bytes."""
    plain = Names({})
    if read_pickle(window, plain) != MAGIC:
        raise UnpicklingError("its magic number is not that of torch.save")
    if read_pickle(window, plain) != PROTOCOL:
        raise UnpicklingError(f"its protocol is not {PROTOCOL}, the only one that torch.save ever wrote")
    system = read_pickle(window, plain)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnpicklingError("it was not saved on a little-endian machine; save it again on another one")
    storages: dict[str, tuple[Tensor, int]] = {}
    allocated = 0

    def allocate(key: str, claimed: int, itemsize: int) -> Tensor:
        nonlocal allocated
        if key not in storages:
            allocated += claimed
            if allocated > window.remaining:
                raise UnpicklingError(f"its tensors claim {allocated} bytes or more, but only {window.remaining} follow")
            storages[key] = torch.empty(claimed, dtype=torch.uint8), itemsize
        if storages[key][0].numel() != claimed:
            raise UnpicklingError(f"the storage {key!a} has two sizes")
        return storages[key][0]

    content = read_pickle(window, names, partial(_persistent_id, allocate))
    keys = read_pickle(window, plain)
    if not isinstance(keys, list) or set(map(repr, keys)) != set(map(repr, storages)) or len(keys) != len(storages):
        raise UnpicklingError("its list of storages does not fit its tensors")
    for key in keys:
        storage, itemsize = storages[key]
        if int.from_bytes(window.read(8), "little") * itemsize != storage.numel():
            raise UnpicklingError(f"it is truncated or damaged: the storage {key!a} has another length than its tensors say")
        _fill(storage, window, key)
    return content


def _persistent_id(load: Callable[[str, int, int], Tensor], identity: Any) -> Any:
    """The storage that a persistent id means; ``load(key, bytes, bytes per element)`` gives its raw bytes."""
    match identity:
        case ("storage", _StorageType(dtype), str(key), str(), int(numel), *rest) if 0 <= numel < LIMIT and not any(rest):
            return _Storage(load(key, numel * dtype.itemsize, dtype.itemsize), dtype)
        case ("module", kind, _, _):
            # A class with its source text; the text is dropped.
            return kind
    raise UnpicklingError("it refers to an object that is no storage (a persistent id); nothing was executed")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A tensor of its storage's type; ``rest`` is whether it needs gradients, its hooks, and flags."""
    return _view(storage, offset, size, stride, storage.dtype, rest[2:])


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *flags: Any) -> Tensor:
    return _view(storage, offset, size, stride, dtype, flags)


def _view(storage: Any, offset: int, size: tuple, stride: tuple, dtype: torch.dtype, flags: tuple) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or any(flags):
        raise UnpicklingError("a tensor is not made of a storage, a shape and strides")
    numbers = (offset, *size, *stride)
    plain = all(type(number) is int and 0 <= number < LIMIT for number in numbers)
    if not plain or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise UnpicklingError("a tensor has a shape, strides or an offset that are none")
    available, numel = storage.flat.numel() // dtype.itemsize, math.prod(size)
    last = offset + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
    if numel == 0:
        return torch.empty(size, dtype=dtype)
    # An expanded tensor would need more memory than its file has once it is copied.
    if last >= available or numel > available:
        raise UnpicklingError(f"a tensor of shape {str(tuple(size))[:100]} reaches beyond its storage of {available} elements")
    return storage.flat[: available * dtype.itemsize].view(dtype).as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise UnpicklingError("a parameter is not made of a tensor")
    return data


def _load_from_bytes(content: Any) -> Any:
    """A storage in a plain pickle is an old torch file within it."""
    if not isinstance(content, bytes):
        raise UnpicklingError(f"torch.storage._load_from_bytes gets a {type(content).__name__}, expected bytes")
    return _read_legacy(Window(io.BytesIO(content), len(content)), _NESTED_NAMES)


def _persistent_object(meta: Any) -> Record:
    """The record of an object of ``torch_utils.persistence``; its class's source text is dropped."""
    match meta:
        case {"type": "class", "class_name": str(name), "state": dict(state)} if re.fullmatch(
            r"[A-Za-z_]\w{0,99}", name, re.ASCII
        ):
            return Record("torch_utils.persistence", name, state=state)
    raise UnpicklingError("a persistent object (torch_utils.persistence) lacks its class name or its attributes")


def _bound_method(owner: Any, name: Any) -> Record:
    """ECT's loss keeps one of its own methods; it stays a name."""
    if not isinstance(owner, Record) or not isinstance(name, str):
        raise UnpicklingError("it names builtins.getattr for something that is no record; nothing was executed")
    return Record("builtins", "getattr", (owner, name))


def _attribute_dict() -> dict[Any, Any]:
    """Its items follow one by one."""
    return {}


def _size(*args: Any) -> torch.Size:
    return torch.Size(args[0] if args else ())


def _device(kind: str, index: int = 0) -> str:
    """A device is where a tensor was; nothing is put there."""
    return f"{kind}:{index}"


_FLOATS = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
_INTEGERS = {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
_STORAGES = {**_FLOATS, **_INTEGERS, "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
_VALUES = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch{place}.{name}Storage": _StorageType(dtype) for name, dtype in _STORAGES.items() for place in ("", ".cuda")},
    "torch.storage.UntypedStorage": _StorageType(torch.uint8),
}
_REBUILD = {
    **PLAIN,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "dnnlib.util.EasyDict": _attribute_dict,
    "builtins.getattr": _bound_method,
    "__builtin__.getattr": _bound_method,
}
_MODULES = r"torch\.nn\.modules\.\w+\.[A-Z]\w*"
_NESTED_NAMES = Names({}, _VALUES)
_NAMES = Names(_REBUILD | {"torch.storage._load_from_bytes": _load_from_bytes}, _VALUES, _MODULES)
