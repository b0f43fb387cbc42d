"""Images out: a grid PNG, a folder of PNGs, or an npz."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.io.atomic import atomic_path, atomic_write

MIN_CELL = 32  # smaller images are enlarged by a whole factor, so that a person can see them


def to_uint8(images_NCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 NHWC: round((x + 1) 127.5), clipped to 0..255."""
    scaled = ((images_NCHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


def grid_image(images_NHWC: np.ndarray, columns: int) -> Image.Image:
    """Lay uint8 images out row by row."""
    num, height, width, channels = images_NHWC.shape
    rows = -(-num // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:num] = images_NHWC
    sheet = (
        cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    )
    factor = max(1, MIN_CELL // width)
    image = to_pil(sheet)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def to_pil(image_HWC: np.ndarray) -> Image.Image:
    """A grey or RGB Pillow image from uint8 HWC."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def save_grid(path: Path, images_NCHW: Tensor, columns: int) -> None:
    """Write a grid of images in [-1, 1] as PNG."""
    atomic_write(path, _png(grid_image(to_uint8(images_NCHW), columns)))


def save_images(path: Path, images_NCHW: Tensor, labels_N: Tensor | None = None) -> None:
    """Write images in [-1, 1] in the form that the path names.

    ``*.png``: one grid; ``*.npz``: arrays ``images`` (uint8 NHWC) and, where there are labels, ``labels``; no suffix: a
    folder of ``000000.png`` and so on. Raises ConfigError for another suffix.
    """
    if path.suffix == ".png":
        save_grid(path, images_NCHW, columns=math.ceil(math.sqrt(len(images_NCHW))))
    elif path.suffix == ".npz":
        arrays = {"images": to_uint8(images_NCHW)} | ({} if labels_N is None else {"labels": labels_N.cpu().numpy()})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    elif not path.suffix:
        for number, image_HWC in enumerate(to_uint8(images_NCHW)):
            atomic_write(path / f"{number:06d}.png", _png(to_pil(image_HWC)))
    else:
        raise ConfigError(f"cannot write images to {path}: give a .png (grid), a .npz, or a folder name without suffix")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
