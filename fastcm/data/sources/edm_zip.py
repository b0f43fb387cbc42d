"""The data set format of EDM and StyleGAN: PNG files and ``dataset.json``, in a zip archive or extracted to a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastcm.data.sources.base import EncodedSource, check_labels, report
from fastcm.data.sources.image import ImageProblem
from fastcm.data.sources.tree import FileTree, open_tree
from fastcm.errors import DataError

INDEX = "dataset.json"


def open_edm_zip(path: Path, labels: bool = True) -> EncodedSource:
    """Images and classes of an EDM data set; without ``dataset.json``, or with labels null, the set has no classes."""
    tree = open_tree(path)
    names = tree.image_names()
    source = EncodedSource(str(path), names, tree.read_bytes)
    table = _read_table(tree) if labels else None
    return source if table is None else source.with_labels(*_match(f"{path}: {INDEX}", table, names))


def _read_table(tree: FileTree) -> list | None:
    where = f"{tree.path}: {INDEX}"
    if INDEX not in tree.names:
        nested = [name for name in tree.names if name.endswith(f"/{INDEX}")]
        if nested:
            raise DataError(f"{tree.path}: found {nested[0]}, expected {INDEX} at the top level")
        return None
    try:
        content = json.loads(tree.read_bytes(INDEX))
    except (ImageProblem, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise DataError(f'{where} has no key "labels", expected {{"labels": [["00000/img00000000.png", 3], ...]}} or null')
    table = content["labels"]
    if table is not None and not isinstance(table, list):
        raise DataError(f'{where}: "labels" is {type(table).__name__}, expected a list of [name, class] or null')
    return table


def _match(where: str, table: list, names: list[str]) -> tuple[np.ndarray, int]:
    bad = [repr(entry)[:80] for entry in table if not _is_entry(entry)]
    _refuse(where, "entries are not [name, integer class]; only integer classes are supported", bad)
    classes = {name.replace("\\", "/"): label for name, label in table}
    if len(classes) < len(table):
        seen: set[str] = set()
        twice = [name for name, _ in table if name in seen or seen.add(name)]
        _refuse(where, "images are labelled more than once", twice)
    known = set(names)
    _refuse(where, "labels are for images that do not exist", [name for name in classes if name not in known])
    _refuse(where, "images have no label", [name for name in names if name not in classes])
    return check_labels(where, np.array([_clip(classes[name]) for name in names], dtype=np.int64), len(names))


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int  # a bool is an int
    )


def _clip(label: int) -> int:
    # JSON integers have no limit, int64 has; what is out of range stays out of range.
    return max(-(2**62), min(label, 2**62))


def _refuse(where: str, what: str, bad: list[str]) -> None:
    if bad:
        raise DataError(report(f"{where}: {len(bad)} {what}", bad))
