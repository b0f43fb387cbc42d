"""Decoding one image file, strictly: what would lose information is an error with advice, never a silent conversion."""

import io
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_BIT_DEPTH_OFFSET = 24
DIRECT_MODES = {"L": "L", "RGB": "RGB", "1": "L"}
ADVICE = {
    "RGBA": "has an alpha channel; flatten it onto a background and save it as RGB",
    "LA": "has an alpha channel; flatten it onto a background and save it as grey",
    "PA": "has an alpha channel; flatten it onto a background and save it as RGB",
    "I": "has more than 8 bits per channel; convert it to 8 bits",
    "I;16": "has 16 bits per channel; convert it to 8 bits",
    "F": "has floating-point pixels; convert it to 8 bits",
    "CMYK": "is CMYK; convert it to RGB",
    "YCCK": "is CMYK; convert it to RGB",
}


class ImageProblem(Exception):
    """Why one image cannot be used; the sentence follows its name."""


def is_image_name(name: str) -> bool:
    """True for the names that are read as images: known extension, not hidden, not macOS archive leftovers."""
    parts = name.split("/")
    return name.lower().endswith(EXTENSIONS) and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def decode_image(data: bytes) -> np.ndarray:
    """Decode a PNG, JPEG, BMP or WebP file to uint8 [H, W, 1] (grey) or [H, W, 3] (RGB).

    Opaque palettes become RGB and bilevel images grey, which loses nothing; EXIF rotation is applied. ImageProblem for
    damaged files and for alpha, 16-bit, CMYK and animated images.
    """
    if not data:
        raise ImageProblem("is empty (0 bytes)")
    if data.startswith(PNG_SIGNATURE) and data[PNG_BIT_DEPTH_OFFSET : PNG_BIT_DEPTH_OFFSET + 1] == b"\x10":
        _fail("I;16")
    try:
        pixels = _decode(data)
    except ImageProblem:
        raise
    # Damaged files make Pillow raise OSError, SyntaxError, ValueError, zlib.error, struct.error and more.
    except Exception as error:
        raise ImageProblem(f"cannot be decoded ({type(error).__name__}: {error})") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _decode(data: bytes) -> np.ndarray:
    if data.startswith(PNG_SIGNATURE):
        # Decoding alone skips the checksums of the pixel chunks.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # A camera's MPO file is a JPEG with extra views behind the first.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise ImageProblem(f"is animated ({image.n_frames} frames); save one frame as PNG")
        mode = _target_mode(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert(mode))


def _target_mode(image: Image.Image) -> str:
    if image.mode == "P" and "transparency" not in image.info:
        return "RGB"
    if "transparency" in image.info:
        _fail("RGBA")
    if image.mode not in DIRECT_MODES:
        _fail(image.mode)
    return DIRECT_MODES[image.mode]


def _fail(mode: str) -> NoReturn:
    raise ImageProblem(ADVICE.get(mode, f"has the pixel format {mode}, expected 8-bit grey or RGB"))
