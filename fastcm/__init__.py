"""fastcm: train and sample few-step image generators, fast.

``load(path)`` gives a model with ``model(x, sigma) -> denoised``; ``sample(model, num, steps, seed)`` draws images;
``accelerate(model)`` makes a model for drawing many.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "accelerate", "load", "sample"]

_LAZY = {"accelerate": "fastcm.sampling.accelerate", "load": "fastcm.io.bundle", "sample": "fastcm.sampling.generate"}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fastcm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
