"""Up- and downsampling of images by two with a small symmetric filter."""

from .reference import resample

__all__ = ["resample"]
