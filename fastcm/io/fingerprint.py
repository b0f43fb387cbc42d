"""Files by their content: the same wherever they lie and whatever they are called."""

import hashlib
from pathlib import Path

from fastcm.io.bundle import MODEL_FILE

GONE = "a file that is not there"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: str, words: tuple[str, ...]) -> str:
    """What a configuration's source of weights stands for: one of these words itself, otherwise the SHA-256 of the file.

    A folder stands for the bundle in it. ``GONE`` where there is no file.
    """
    if source in words:
        return source
    path = Path(source) / MODEL_FILE if Path(source).is_dir() else Path(source)
    return f"sha256 {sha256(path)}" if path.is_file() else GONE
