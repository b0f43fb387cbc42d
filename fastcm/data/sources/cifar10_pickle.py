"""CIFAR-10's Python batches, read without executing pickle code."""

import io

import numpy as np

from fastcm.errors import DataError
from fastcm.passive_pickle import PLAIN, Names, Window, read_pickle


def read_python_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [M, 3072] and labels [M] of one batch file; DataError if it is damaged or holds anything else."""
    try:
        batch = read_pickle(Window(io.BytesIO(content), len(content)), Names(PLAIN))
        pixels = batch["data"]
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            raise ValueError(f"data is a {type(pixels).__name__}, expected an array of uint8")
        return pixels, np.array(batch["labels"], dtype=np.int64)
    # What a pickle describes can be anything.
    except Exception as error:
        raise DataError(f"{name} is not a CIFAR-10 Python batch: {type(error).__name__}: {error}") from error
