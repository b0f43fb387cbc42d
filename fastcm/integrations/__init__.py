"""Formats and conventions of other projects: the Hugging Face layout, and folders that diffusers reads and writes.

Nothing here needs the other project installed, except ``HubModel`` (``pip install fastcm[hub]``).
"""

from typing import Any

__all__ = [
    "HubModel",
    "export_diffusers",
    "export_hub",
    "export_official",
    "import_diffusers",
    "import_hub",
    "pipeline_timesteps",
]

_LAZY = {
    "HubModel": "hub",
    "export_hub": "hub_layout",
    "import_hub": "hub_layout",
    "export_diffusers": "diffusers",
    "import_diffusers": "diffusers",
    "pipeline_timesteps": "diffusers_config",
    "export_official": "official",
}


def __getattr__(name: str) -> Any:
    """Import a format only when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fastcm.integrations' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"fastcm.integrations.{_LAZY[name]}"), name)
