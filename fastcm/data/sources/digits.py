"""The handwritten digits that come with scikit-learn: 1797 grey images of 8x8 in ten classes, no download."""

import numpy as np

from fastcm.data.sources.base import ArraySource

MAX_GREY = 16


def open_digits(labels: bool = True) -> ArraySource:
    """The embedded digits, grey levels 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / MAX_GREY)).astype(np.uint8)
    return ArraySource("digits", images, digits.target.astype(np.int64) if labels else None, 10)
