"""A folder (or zip archive) of image files, with classes given by its subfolders."""

from pathlib import Path

import numpy as np

from fastcm.data.sources.base import EncodedSource
from fastcm.data.sources.edm_zip import INDEX
from fastcm.data.sources.tree import FileTree, open_tree
from fastcm.errors import DataError


def open_folder(path: Path, labels: bool = True) -> EncodedSource:
    """Every image below ``path``, in the order of its names.

    If all of them lie in two or more first-level subfolders, those are the classes, numbered by sorted name. Images
    directly in ``path``, or a single subfolder, mean a set without classes.
    """
    tree = open_tree(path)
    names = tree.image_names()
    if INDEX in tree.names:
        raise DataError(f"{path} holds {INDEX}, so its subfolders are not classes; open it with kind edm_zip")
    source = EncodedSource(str(path), names, tree.read_bytes)
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    if not labels or len(classes) < 2 or any("/" not in name for name in names):
        return source
    _check_no_empty_class(tree, classes)
    number = {name: i for i, name in enumerate(classes)}
    return source.with_labels(np.array([number[name.split("/")[0]] for name in names], dtype=np.int64), len(classes))


def _check_no_empty_class(tree: FileTree, classes: list[str]) -> None:
    if not tree.path.is_dir():
        return
    folders = {entry.name for entry in tree.path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    empty = sorted(folders - set(classes))
    if empty:
        raise DataError(f"{tree.path}: subfolder {empty[0]} holds no images, so classes are unclear; remove it or fill it")
