"""Images and classes in one NumPy archive."""

from pathlib import Path

import numpy as np

from fastcm.data.sources.base import ArraySource, check_labels
from fastcm.errors import DataError

IMAGE_KEYS = ("images", "x_train", "x", "arr_0")
LABEL_KEYS = ("labels", "y_train", "y", "arr_1")


def open_npz(path: Path, labels: bool = True, label_dim: int | None = None) -> ArraySource:
    """An .npz with uint8 images [M, H, W, C] or [M, H, W] and, if it has classes, integer labels [M].

    The images are under the key "images", "x_train", "x" or "arr_0", the labels under "labels", "y_train", "y" or "arr_1".
    label_dim: number of classes, None for the largest label + 1. Pickled arrays are refused.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist, expected an .npz file")
    images, classes = _read(path)
    if images.ndim == 3:
        images = images[..., None]
    _check_images(path, images)
    if classes is None or not labels:
        return ArraySource(str(path), images, None, 0)
    return ArraySource(str(path), images, *check_labels(str(path), classes, len(images), label_dim))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            image_key = next((key for key in IMAGE_KEYS if key in archive), None)
            label_key = next((key for key in LABEL_KEYS if key in archive), None)
            if image_key is None:
                raise DataError(f"{path} has the keys {sorted(archive)}, expected images under one of {', '.join(IMAGE_KEYS)}")
            return archive[image_key], archive[label_key] if label_key else None
    except DataError:
        raise
    # A damaged archive makes NumPy raise almost anything.
    except Exception as error:
        raise DataError(f"{path} is not an .npz archive of plain arrays, or it is damaged: {error}") from error


def _check_images(path: Path, images: np.ndarray) -> None:
    found = f"{path}: images are {images.dtype} of shape {images.shape}"
    if images.ndim != 4 or not len(images):
        raise DataError(f"{found}, expected uint8 [M, H, W, C] with at least one image")
    if images.dtype != np.uint8:
        raise DataError(f"{found}, expected uint8 with values 0..255")
    if images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        raise DataError(f"{found}, channels first; expected channels last: images.transpose(0, 2, 3, 1)")
