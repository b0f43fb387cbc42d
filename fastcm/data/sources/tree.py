"""Named files in a zip archive or below a folder, read without unpacking anything."""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastcm.data.sources.base import report
from fastcm.data.sources.image import EXTENSIONS, ImageProblem, is_image_name
from fastcm.errors import DataError


@dataclass(frozen=True)
class FileTree:
    """Files of one data set; names are relative, sorted, with forward slashes."""

    path: Path
    names: Sequence[str]
    read_bytes: Callable[[str], bytes]

    def image_names(self) -> list[str]:
        """The names that are images; DataError if there is none."""
        images = [name for name in self.names if is_image_name(name)]
        if not images:
            found = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in self.names)
            kinds = ", ".join(f"{count} x {kind}" for kind, count in found.most_common(5)) or "no files at all"
            raise DataError(f"{self.path} holds no images: found {kinds}, expected {', '.join(EXTENSIONS)}")
        return images


def open_tree(path: Path) -> FileTree:
    """List a zip archive or a folder; DataError if it is missing, no archive, damaged, or names a file twice."""
    if not path.exists():
        raise DataError(f"{path} does not exist, expected a zip archive or a folder of images")
    return _open_folder(path) if path.is_dir() else _open_zip(path)


def _open_folder(root: Path) -> FileTree:
    names: list[str] = []
    visited = {os.path.realpath(root)}

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        # A link that points upwards would be followed for ever.
        subfolders[:] = [name for name in subfolders if os.path.realpath(f"{folder}/{name}") not in visited]
        visited.update(os.path.realpath(f"{folder}/{name}") for name in subfolders)
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]

    def read_bytes(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError as error:
            raise ImageProblem(f"cannot be read ({error.strerror})") from error

    return FileTree(root, sorted(names), read_bytes)


def _open_zip(path: Path) -> FileTree:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        size = path.stat().st_size
        raise DataError(f"{path} ({size} bytes) is not a zip archive, or it is truncated: {error}; copy it again") from error
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(report(f"{path}: {len(twice)} names occur more than once", twice))

    def read_bytes(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise ImageProblem(f"cannot be read from the archive ({error})") from error

    return FileTree(path, sorted(names), read_bytes)
