"""The optimizer step: unscale, finite check, Adam or RAdam, averages and low-precision copy of all weights at once."""

from .apex import apex_unavailable, optimizer_step_apex
from .layout import FlatLayout
from .reference import optimizer_step as optimizer_step_reference
from .reference import step_scalars
from .registration import optimizer_step

__all__ = [
    "FlatLayout",
    "apex_unavailable",
    "optimizer_step",
    "optimizer_step_apex",
    "optimizer_step_reference",
    "step_scalars",
]
