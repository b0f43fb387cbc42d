"""Published checkpoints of every format into bundles: what kind one is, what it cannot tell, and a check of the result."""

from fastcm.convert.bundle import Conversion, convert
from fastcm.convert.options import Options

__all__ = ["Conversion", "Options", "convert"]
