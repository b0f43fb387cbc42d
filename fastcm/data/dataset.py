"""A data set in memory: every image is decoded once, before training, so that a damaged one is found then."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from fastcm.data.sources import Source
from fastcm.data.sources.base import report
from fastcm.errors import ConfigError, DataError

DECODE_CHUNK = 64
PROGRESS_DELAY_S = 2.0
MEMORY_FRACTION = 0.8


@dataclass(frozen=True, eq=False)
class ResidentDataset:
    """All images of a set as one uint8 tensor [M, H, W, C], on the GPU or in CPU memory.

    labels: int64 class of each image, None without classes; label_dim: number of classes (0 without);
    fingerprint: sha256 over pixels and labels, the same wherever the files lie; name: for messages.
    """

    images: UInt8[Tensor, "M H W C"]
    labels: Int64[Tensor, " M"] | None
    label_dim: int
    fingerprint: str
    name: str

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    @property
    def num_bytes(self) -> int:
        """Memory that the pixels take."""
        return self.images.numel()


def load_resident(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    pin: bool = False,
    max_bytes: int | None = None,
    num_threads: int | None = None,
) -> ResidentDataset:
    """Decode every image of ``source`` and keep them all in memory on ``device``.

    pin: page-lock CPU memory so that copies to a GPU are asynchronous. max_bytes: most memory the pixels may take;
    None allows 80 % of what is free. num_threads: decoders; None takes one per core, at most 16.
    Raises ConfigError when the set does not fit, DataError naming up to ten images that cannot be used.
    """
    device = torch.device(device)
    check_memory(source, device, max_bytes)
    images = decode_all(source, num_threads or min(16, os.cpu_count() or 1))
    pixels, labels = torch.from_numpy(images), None
    if source.labels is not None:
        labels = torch.from_numpy(source.labels).to(device)
    pixels = pixels.pin_memory() if pin and device.type == "cpu" else pixels.to(device)
    return ResidentDataset(pixels, labels, source.label_dim, fingerprint(images, source.labels, source.label_dim), source.name)


def fingerprint(images: np.ndarray, labels: np.ndarray | None, label_dim: int) -> str:
    """sha256 over the shape, the labels and the pixels: changes with any of them and with nothing else."""
    digest = hashlib.sha256(f"{images.shape} {label_dim} {labels is not None}".encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    for image in images:
        digest.update(image.data)
    return digest.hexdigest()


def check_memory(source: Source, device: torch.device, max_bytes: int | None = None) -> None:
    """Raise ConfigError if the decoded pixels of ``source`` need more than ``max_bytes`` (None: 80 % of free memory)."""
    needed = len(source) * prod(source.image_shape)
    # Decoding fills CPU memory first, also when the images then move to the GPU.
    for place in {torch.device("cpu"), device}:
        allowed = int(MEMORY_FRACTION * _free_bytes(place)) if max_bytes is None else max_bytes
        if needed > allowed:
            shape = "x".join(map(str, source.image_shape))
            raise ConfigError(
                f"{source.name}: {len(source)} images of {shape} need {_gib(needed)} of {place.type} memory, "
                f"{_gib(allowed)} are allowed; use fewer or smaller images or a machine with more memory"
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def decode_all(source: Source, num_threads: int) -> np.ndarray:
    """All images as uint8 [M, H, W, C]; DataError names up to ten that cannot be used and counts the rest."""
    channels, height, width = source.image_shape
    images = np.empty((len(source), height, width, channels), dtype=np.uint8)

    def decode(indices: range) -> list[str]:
        return [problem for i in indices if (problem := _decode_into(images, source, i))]

    problems: list[str] = []
    with ThreadPoolExecutor(num_threads) as pool, _progress(source) as bar:
        for indices, found in zip(_chunks(len(source)), pool.map(decode, _chunks(len(source))), strict=True):
            problems += found
            bar.update(len(indices))
    if problems:
        raise DataError(report(f"{source.name}: {len(problems)} of {len(source)} images cannot be used", problems))
    return images


def _decode_into(images: np.ndarray, source: Source, i: int) -> str | None:
    try:
        images[i] = source.read(i)
    except DataError as error:
        return str(error)
    return None


def _chunks(count: int) -> Iterator[range]:
    return (range(start, min(start + DECODE_CHUNK, count)) for start in range(0, count, DECODE_CHUNK))


def _progress(source: Source) -> tqdm:
    return tqdm(total=len(source), desc=f"reading {source.name}", unit="img", delay=PROGRESS_DELAY_S, leave=False, disable=None)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
