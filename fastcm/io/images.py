"""Images out: a grid PNG, a folder of PNGs, or an npz."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.io.atomic import atomic_path, atomic_write, check_place

MIN_CELL = 32  # pixels; smaller images are enlarged, so that a person can see them
LINE = 2  # pixels between the images of a grid


def to_uint8(images_NCHW: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 NHWC: round((x + 1) 127.5), clipped to 0..255."""
    scaled = ((images_NCHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


def grid_image(images_NHWC: np.ndarray, columns: int) -> Image.Image:
    """Lay uint8 images out row by row with a white line between them; small ones are enlarged by a whole factor."""
    factor = max(1, MIN_CELL // images_NHWC.shape[2])
    cells = images_NHWC.repeat(factor, axis=1).repeat(factor, axis=2)
    num, height, width, channels = cells.shape
    rows, down, across = -(-num // columns), height + LINE, width + LINE
    sheet = np.full((rows * down - LINE, columns * across - LINE, channels), 255, np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * down, number % columns * across
        sheet[top : top + height, left : left + width] = cell
    return to_pil(sheet)


def to_pil(image_HWC: np.ndarray) -> Image.Image:
    """A grey or RGB Pillow image from uint8 HWC."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def save_grid(path: Path, images_NCHW: Tensor, columns: int) -> None:
    """Write a grid of images in [-1, 1] as PNG."""
    atomic_write(path, _png(grid_image(to_uint8(images_NCHW), columns)))


def save_side_by_side(path: Path, sets: list[np.ndarray], columns: int) -> None:
    """Write one grid per set of uint8 NHWC images, from left to right with a white gap between them, as PNG."""
    grids = [grid_image(images, columns) for images in sets]
    gap = grids[0].width // columns
    sheet = Image.new(grids[0].mode, (sum(grid.width + gap for grid in grids) - gap, grids[0].height), "white")
    left = 0
    for grid in grids:
        sheet.paste(grid, (left, 0))
        left += grid.width + gap
    atomic_write(path, _png(sheet))


def check_destination(path: Path) -> str:
    """ ".png", ".npz" or "" (a folder), as the path asks for.

    Raises ConfigError for another suffix, CheckpointError where nothing can be written to that path.
    """
    form = path.suffix.lower()
    if form not in (".png", ".npz", ""):
        raise ConfigError(f"cannot write images to {path}: give a .png (grid), a .npz, or a folder name without suffix")
    check_place(path if form else path / "000000.png")
    return form


def save_images(path: Path, images_NCHW: Tensor, labels_N: Tensor | None = None) -> None:
    """Write images in [-1, 1] in the form that the path names.

    ``*.png``: one grid; ``*.npz``: arrays ``images`` (uint8 NHWC) and, where there are labels, ``labels``; no suffix: a
    folder of ``000000.png`` and so on. Raises ConfigError for another suffix.
    """
    form = check_destination(path)
    if form == ".png":
        save_grid(path, images_NCHW, columns=math.ceil(math.sqrt(len(images_NCHW))))
    elif form == ".npz":
        arrays = {"images": to_uint8(images_NCHW)} | ({} if labels_N is None else {"labels": labels_N.cpu().numpy()})
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    else:
        for number, image_HWC in enumerate(to_uint8(images_NCHW)):
            atomic_write(path / f"{number:06d}.png", _png(to_pil(image_HWC)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
