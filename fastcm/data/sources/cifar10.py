"""CIFAR-10's training set in its official layouts, packed or extracted, or as an .npz file."""

import tarfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from fastcm.data.sources.base import ArraySource, check_labels
from fastcm.data.sources.cifar10_pickle import read_python_batch
from fastcm.data.sources.download import download_file
from fastcm.data.sources.npz import open_npz
from fastcm.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
IMAGES_PER_BATCH = 10_000
IMAGE_SHAPE = (3, 32, 32)  # (C, H, W)
PIXELS = prod(IMAGE_SHAPE)
NUM_CLASSES = 10
MAX_BATCH_BYTES = 2**26


def open_cifar10(path: Path, labels: bool = True, download: bool = False) -> ArraySource:
    """The 50,000 training images from the binary or Python version, as .tar.gz or extracted, or from an .npz file.

    ``path`` is the archive, the extracted folder, or a folder that holds either. Pickles are read without executing
    anything. download: fetch the binary version into ``path`` if nothing is there, and check its md5.
    """
    found = _locate(path)
    if found is None and download:
        target = path if path.name in ARCHIVES else path / next(iter(ARCHIVES))
        found = download_file(URL + target.name, target, ARCHIVES[target.name])
    if found is None:
        raise DataError(
            f"{path}: no CIFAR-10 here, expected {' or '.join(ARCHIVES)}, an extracted {' or '.join(FOLDERS)}, or an .npz; "
            f"get one from {URL}cifar.html or set data.download=true"
        )
    if found.suffix == ".npz":
        return _check_size(open_npz(found, labels, NUM_CLASSES))
    images, classes = _read_batches(found, _folder_files(found) if found.is_dir() else _tar_files(found))
    return ArraySource(str(found), images, classes if labels else None, NUM_CLASSES)


def _locate(path: Path) -> Path | None:
    if path.is_file():
        return path
    if any((path / f"{BATCHES[0]}{suffix}").is_file() for suffix in ("", ".bin")):
        return path
    return next((path / name for name in (*FOLDERS, *ARCHIVES) if (path / name).exists()), None)


def _check_size(source: ArraySource) -> ArraySource:
    if source.image_shape != IMAGE_SHAPE:
        raise DataError(f"{source.name}: images are (C, H, W) = {source.image_shape}, expected {IMAGE_SHAPE} for CIFAR-10")
    return source


def _read_batches(path: Path, files: Iterator[tuple[str, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, content in files:
        stem = name.removesuffix(".bin")
        if stem in batches:
            raise DataError(f"{path}: {stem} occurs more than once")
        batches[stem] = (_binary_batch if name.endswith(".bin") else read_python_batch)(f"{path}: {name}", content)
    missing = [name for name in BATCHES if name not in batches]
    if missing:
        raise DataError(
            f"{path}: {', '.join(missing)} missing, expected {BATCHES[0]} to {BATCHES[-1]}; a part can be given as .npz"
        )
    pixels = np.concatenate([_check_batch(path, name, *batches[name]) for name in BATCHES])
    labels, _ = check_labels(str(path), np.concatenate([batches[name][1] for name in BATCHES]), len(pixels), NUM_CLASSES)
    return np.ascontiguousarray(pixels.reshape(-1, *IMAGE_SHAPE).transpose(0, 2, 3, 1)), labels


def _check_batch(path: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if pixels.shape != (IMAGES_PER_BATCH, PIXELS) or labels.shape != (IMAGES_PER_BATCH,):
        raise DataError(
            f"{path}: {name} holds {len(pixels)} images and {len(labels)} labels, expected {IMAGES_PER_BATCH} of each"
        )
    return pixels


def _binary_batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    expected = IMAGES_PER_BATCH * (1 + PIXELS)
    if len(content) != expected:
        raise DataError(f"{name} has {len(content)} bytes, expected {expected}; it is truncated or not CIFAR-10")
    rows = np.frombuffer(content, np.uint8).reshape(IMAGES_PER_BATCH, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    # A folder may hold both versions; the binary one needs no pickle.
    suffix = ".bin" if (folder / f"{BATCHES[0]}.bin").is_file() else ""
    return ((path.name, path.read_bytes()) for name in BATCHES if (path := folder / f"{name}{suffix}").is_file())


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name.removesuffix(".bin") in BATCHES:
                    yield name, _member_bytes(path, archive, member)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        size = path.stat().st_size
        raise DataError(f"{path} ({size} bytes) is not a tar archive, or it is truncated: {error}; get it again") from error


def _member_bytes(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_BATCH_BYTES:
        raise DataError(f"{path}: {member.name} has {member.size} bytes, expected at most {MAX_BATCH_BYTES}")
    with archive.extractfile(member) as file:
        return file.read()
