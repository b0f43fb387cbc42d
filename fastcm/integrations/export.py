"""What ``fastcm export`` does: one set of weights of a bundle, in any of the layouts that can be written."""

from collections.abc import Callable
from pathlib import Path

from fastcm.errors import ConfigError
from fastcm.integrations.diffusers import export_diffusers
from fastcm.integrations.hub_layout import export_hub, model_of_bundle
from fastcm.integrations.official import export_official
from fastcm.io.bundle import MODEL_FILE, resolve_bundle, save_bundle

# By format: (bundle or run folder, destination, weight average) -> what else to tell the user.
FORMATS: dict[str, Callable[[Path, Path, str], str]] = {
    "hf": lambda path, folder, ema: export_hub(path, folder, ema=ema) or "load it with fastcm.integrations.HubModel",
    "diffusers": lambda path, folder, ema: f"timesteps of the pipeline: {export_diffusers(path, folder, ema=ema)}",
    "safetensors": lambda path, file, ema: export_bundle(path, file, ema=ema) or "load it with fastcm.load",
    "edm": lambda path, file, ema: export_official(path, file, "edm", ema=ema),
    "openai": lambda path, file, ema: export_official(path, file, "openai", ema=ema),
    "edm2": lambda path, file, ema: export_official(path, file, "edm2", ema=ema),
}


def export(path: str | Path, destination: str | Path, form: str, *, ema: str = "") -> str:
    """Write the weights of a bundle or run folder in one of ``FORMATS``, chosen by ``ema`` as in ``load``: what else to tell.

    Raises ConfigError where that would overwrite the bundle itself or what a format cannot express, CheckpointError for a
    bundle that is damaged or lacks these weights.
    """
    path, destination = Path(path), Path(destination)
    bundle = resolve_bundle(path).resolve()
    if bundle in (destination.resolve(), (destination / MODEL_FILE).resolve()):
        raise ConfigError(f"{destination}: this would overwrite the bundle to be exported; choose another destination")
    return FORMATS[form](path, destination, ema)


def export_bundle(path: str | Path, file: str | Path, *, ema: str = "") -> None:
    """Write a bundle with one set of weights, chosen by ``ema`` as in ``load``: what sampling needs and no more.

    Raises CheckpointError for a bundle that is damaged or lacks these weights.
    """
    model, header = model_of_bundle(path, ema)
    save_bundle(Path(file), header, model.net.state_dict(), {})
