"""Formats that images are read from, one file each; ``open_source`` picks one by name."""

from pathlib import Path

from fastcm.data.sources.base import Source, describe
from fastcm.data.sources.cifar10 import open_cifar10
from fastcm.data.sources.digits import open_digits
from fastcm.data.sources.edm_zip import open_edm_zip
from fastcm.data.sources.folder import open_folder
from fastcm.data.sources.npz import open_npz
from fastcm.errors import ConfigError, DataError

__all__ = ["KINDS", "Source", "open_source"]

KINDS = ("digits", "cifar10", "edm_zip", "folder", "npz")


def open_source(
    kind: str, path: str | Path | None = None, *, resolution: int | None = None, labels: bool = True, download: bool = False
) -> Source:
    """Open a set of images: kind "digits", "cifar10", "edm_zip", "folder" or "npz".

    path: archive, file or folder (none for digits); resolution: expected side in pixels, None or 0 for any; labels: take
    the classes if the set has some; download: fetch CIFAR-10 if it is not at ``path``.
    Raises ConfigError for an unknown kind or a missing path, DataError for everything wrong with the files.
    """
    if kind not in KINDS:
        raise ConfigError(f"data.kind {kind!r} is unknown, expected one of {', '.join(KINDS)}")
    if download and kind != "cifar10":
        raise ConfigError(f"data.download works for kind cifar10 only, not for {kind}")
    source = _open(kind, path, labels, download)
    if resolution and source.image_shape[1] != resolution:
        raise DataError(f"{source.name}: images are {describe(*source.image_shape)}, expected {resolution}x{resolution}")
    return source


def _open(kind: str, path: str | Path | None, labels: bool, download: bool) -> Source:
    if kind == "digits":
        return open_digits(labels)
    if not path:
        raise ConfigError(f"data.path is empty, expected the archive, file or folder for kind {kind}")
    if kind == "cifar10":
        return open_cifar10(Path(path), labels, download)
    return {"edm_zip": open_edm_zip, "folder": open_folder, "npz": open_npz}[kind](Path(path), labels)
