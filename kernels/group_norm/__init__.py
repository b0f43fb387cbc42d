"""Group normalisation with everything a U-Net block does around it."""

from .reference import group_norm as group_norm_reference
from .registration import group_norm, group_norm_jvp

__all__ = ["group_norm", "group_norm_jvp", "group_norm_reference"]
