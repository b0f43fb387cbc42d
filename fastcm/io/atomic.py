"""Files that appear whole or not at all, also when the disk is full or the process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastcm.errors import CheckpointError

TEMPORARY = ".*.tmp-*"  # how unfinished files are called


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; on success it is synced and renamed to ``path``.

    On any failure the temporary file is removed and ``path`` keeps its former content.
    Raises CheckpointError where the file system refuses (disk full, no permission).
    """
    check_place(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; what was saved before is untouched") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise CheckpointError where no file can come to be at ``path``: something else is there, or no folder that takes one."""
    if os.path.exists(path) and not os.path.isfile(path):  # unlike those of a Path, these do not raise
        raise CheckpointError(f"cannot write {path}: it is there already and is no file; choose another destination")
    place = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not os.path.isdir(place):
        raise CheckpointError(f"cannot write {path}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: nothing may be written to the folder {place}")


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes through ``atomic_path``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
