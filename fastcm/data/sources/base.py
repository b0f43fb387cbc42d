"""What every format is turned into: numbered images of one shape, with or without classes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from fastcm.data.sources.image import ImageProblem, decode_image
from fastcm.errors import DataError

MAX_LISTED = 10
MAX_CLASSES = 100_000


class Source(ABC):
    """A set of images of one shape; ``read(i)`` gives image i as uint8 [H, W, C].

    name: for messages; image_shape: (C, H, W); label_dim: number of classes, 0 without; labels: int64 [M] or None.
    """

    name: str
    image_shape: tuple[int, int, int]
    label_dim: int
    labels: np.ndarray | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Image i as uint8 [H, W, C]; DataError says what is wrong with it."""

    @abstractmethod
    def image_name(self, i: int) -> str:
        """What to call image i in a message."""


class ArraySource(Source):
    """Images that are already in memory as uint8 [M, H, W, C]."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray | None, label_dim: int) -> None:
        self.name, self.images, self.labels, self.label_dim = name, images, labels, label_dim if labels is not None else 0
        height, width, channels = images.shape[1:]
        check_shape(name, "the images", (channels, height, width))
        self.image_shape = channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        """Image i as uint8 [H, W, C]."""
        return self.images[i]

    def image_name(self, i: int) -> str:
        """What to call image i in a message."""
        return f"image {i}"


class EncodedSource(Source):
    """Image files, decoded when read; ``read_bytes`` gets the contents of a name in ``names``.

    The first image that can be decoded sets the shape that all others must have.
    """

    def __init__(self, name: str, names: Sequence[str], read_bytes: Callable[[str], bytes]) -> None:
        self.name, self.names, self.labels, self.label_dim = name, names, None, 0
        self._read_bytes = read_bytes
        self._model_name, self.image_shape = self._find_model()

    def with_labels(self, labels: np.ndarray, label_dim: int) -> "EncodedSource":
        """Attach the classes of the images."""
        self.labels, self.label_dim = labels, label_dim
        return self

    def __len__(self) -> int:
        return len(self.names)

    def image_name(self, i: int) -> str:
        """Path of image i inside the archive or folder."""
        return self.names[i]

    def read(self, i: int) -> np.ndarray:
        """Decode image i; DataError names it and says what was found and expected."""
        image = self._decode(self.names[i])
        height, width, channels = image.shape
        if (channels, height, width) != self.image_shape:
            raise DataError(
                f"{self.names[i]} is {describe(channels, height, width)}, expected {describe(*self.image_shape)} "
                f"like {self._model_name}; all images must have one size and one channel count"
            )
        return image

    def _decode(self, name: str) -> np.ndarray:
        try:
            return decode_image(self._read_bytes(name))
        except ImageProblem as problem:
            raise DataError(f"{name} {problem}") from problem

    def _find_model(self) -> tuple[str, tuple[int, int, int]]:
        problems = []
        for name in self.names:
            try:
                height, width, channels = self._decode(name).shape
            except DataError as error:
                problems.append(str(error))
                if len(problems) >= MAX_LISTED:
                    break
                continue
            check_shape(self.name, name, (channels, height, width))
            return name, (channels, height, width)
        raise DataError(report(f"{self.name}: no image can be read (of {len(self.names)})", problems))


def describe(channels: int, height: int, width: int) -> str:
    """A shape in words, such as "32x32 RGB"."""
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB' if channels == 3 else f'{channels}-channel'}"


def check_shape(source: str, name: str, image_shape: tuple[int, int, int]) -> None:
    """Raise DataError unless the image is square, at least 2x2, and grey or RGB."""
    channels, height, width = image_shape
    found = f"{source}: {name}: {width}x{height} with {channels} channel(s)"
    if channels not in (1, 3):
        raise DataError(f"{found}, expected 1 (grey) or 3 (RGB)")
    if height != width:
        raise DataError(f"{found}, expected square images; crop or resize them first")
    if height < 2:
        raise DataError(f"{found}, expected at least 2x2")


def check_labels(source: str, labels: np.ndarray, num_images: int, label_dim: int | None = None) -> tuple[np.ndarray, int]:
    """The classes as int64 [M] and their number (largest + 1 unless given); DataError for a wrong count, type or range."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{source}: labels are {labels.dtype} of shape {labels.shape}, "
            f"expected one integer class for each of {num_images} images"
        )
    limit = label_dim or MAX_CLASSES
    bad = np.flatnonzero((labels < 0) | (labels >= limit))
    if bad.size:
        lines = [f"image {i} has label {labels[i]}" for i in bad[:MAX_LISTED]]
        raise DataError(report(f"{source}: {bad.size} labels are outside [0, {limit})", lines, bad.size))
    return labels.astype(np.int64), label_dim or int(labels.max()) + 1


def report(headline: str, lines: Sequence[str], total: int | None = None) -> str:
    """A headline and up to ten lines below it, with the number of those left out."""
    total = len(lines) if total is None else total
    shown = [f"  {line}" for line in lines[:MAX_LISTED]]
    rest = [f"  ... and {total - len(shown)} more"] if total > len(shown) else []
    return "\n".join([f"{headline}:", *shown, *rest])
