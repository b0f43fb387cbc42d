"""CIFAR-10's Python batches, read without executing pickle code.

A pickle may name any importable object and call it. Here the few names that the official batches contain stand for
passive records, everything else is refused, and the arrays are rebuilt from the records by hand.
"""

import io
import pickle
from typing import Any

import numpy as np

from fastcm.errors import DataError


class _Record:
    """Keeps what a pickle would have called something with."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record): ...


class _DType(_Record): ...


class _Encoded(_Record): ...


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Record,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Encoded,
}


class _PassiveUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10 does not contain; nothing was executed")
        return STAND_INS[module, name]


def read_python_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [M, 3072] and labels [M] of one batch file; DataError if it is damaged or holds anything else."""
    try:
        batch = _PassiveUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        return _rebuild(batch["data"]), np.array(batch["labels"], dtype=np.int64)
    # A damaged pickle raises almost anything.
    except Exception as error:
        raise DataError(f"{name} is not a CIFAR-10 Python batch: {type(error).__name__}: {error}") from error


def _rebuild(array: Any) -> np.ndarray:
    """The uint8 array that a record of ``ndarray.__setstate__((version, shape, dtype, fortran, bytes))`` describes."""
    if not isinstance(array, _Array):
        raise ValueError(f"data is a {type(array).__name__}, expected an array")
    _, shape, dtype, fortran, content = array.state
    if not isinstance(dtype, _DType) or dtype.args[0] not in ("u1", b"u1"):
        raise ValueError("data is not uint8")
    if isinstance(content, _Encoded):
        content = content.args[0].encode("latin1")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
