"""Group normalisation with everything a U-Net block does around it."""

from .reference import group_norm

__all__ = ["group_norm"]
