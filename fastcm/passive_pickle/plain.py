"""Plain data in pickles: bytes, sets, ordered dicts, and numpy's arrays, types and scalars."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from fastcm.passive_pickle.records import Record, UnpicklingError, checked_key, describe, recorder


def fill_array(array: np.ndarray, state: Any) -> None:
    """What ``ndarray.__setstate__((version, shape, dtype, fortran, bytes))`` does, after a check of every part."""
    _, shape, dtype, fortran, content = state
    rebuilt = _array(content, dtype, shape)
    array.__setstate__((1, rebuilt.shape, rebuilt.dtype, bool(fortran), rebuilt.tobytes()))


def _array(content: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    """The array of raw bytes; only real, complex, integer and boolean types."""
    # Python 2 wrote bytes as text.
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, bytes | bytearray):
        raise UnpicklingError(f"an array has {describe(content)} as content, expected bytes")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise UnpicklingError("an array has a shape that is none")
    return np.frombuffer(bytes(content), _dtype(dtype)).reshape(shape, order=order)


def _dtype(record: Any) -> np.dtype:
    """The type that ``dtype(code, align, copy)`` with the state (version, byte order, ...) describes."""
    known = isinstance(record, Record) and (record.module, record.name) == ("numpy", "dtype") and record.args
    code = _text(record.args[0]) if known else ""
    state = record.state if known and isinstance(record.state, tuple) else (3, "|", None, None, None)
    order = _text(state[1]) if len(state) > 1 else ""
    # A subarray, or fields.
    structured = any(part is not None for part in state[2:5])
    if not re.fullmatch("[biufc][0-9]{1,2}", code) or order not in ("<", ">", "|", "=") or structured:
        raise UnpicklingError("an array has a type that is no plain number")
    return np.dtype(order + code)


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _scalar(dtype: Any, content: Any) -> bool | int | float | complex:
    return _array(content, dtype, ()).item()


def _encode(text: str, encoding: str) -> bytes:
    """What protocol 2 writes for bytes."""
    if encoding != "latin1":
        raise UnpicklingError(f"it encodes text as {encoding!r:.100}, expected latin1")
    return text.encode("latin1")


def _plain(kind: type) -> Callable[..., Any]:
    """A set, a bytes object or the like from one list of plain items."""

    def make(*args: Any) -> Any:
        if len(args) > 1 or not all(isinstance(part, list | tuple | bytes) for part in args):
            raise UnpicklingError(f"it makes a {kind.__name__} of something that is no list")
        return kind(map(checked_key, args[0]) if args else ())

    return make


def _ordered(*args: Any) -> OrderedDict[Any, Any]:
    made = OrderedDict()
    for key, value in args[0] if args else ():
        made[checked_key(key)] = value
    return made


def _empty_array(*_: Any) -> np.ndarray:
    return np.empty(0, np.uint8)


_BUILTINS = {name: _plain(kind) for name, kind in {"set": set, "frozenset": frozenset, "bytes": bytes}.items()}
# What Python and numpy write for plain data, under the names of their old and new versions.
PLAIN: dict[str, Callable[..., Any]] = {
    **{f"{module}.{name}": make for module in ("__builtin__", "builtins") for name, make in _BUILTINS.items()},
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered,
    **{f"numpy.{name}": recorder("numpy", name) for name in ("dtype", "ndarray")},
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
}
