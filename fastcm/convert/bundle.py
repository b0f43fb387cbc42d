"""``fastcm convert``: read a checkpoint, recognise it, write the bundle, check it, say what was found."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.convert.check import Checked, check_bundle
from fastcm.convert.options import Options, find_preset
from fastcm.convert.recognize import Plan, recognize, with_mid_sigmas
from fastcm.convert.source import Weights, as_float32, dtypes, read_source
from fastcm.convert.told import Told
from fastcm.errors import CheckpointError, ConfigError, FastcmError
from fastcm.integrations.diffusers import INDEX, UNET, UNET_CLASS, WEIGHTS, import_diffusers
from fastcm.integrations.files import read_json
from fastcm.integrations.hub_layout import CONFIG_FILE, LIBRARY, ONLY_NET, WEIGHTS_FILE, import_hub
from fastcm.integrations.official import SOURCE, layout_record
from fastcm.io.atomic import atomic_path
from fastcm.io.bundle import BundleHeader, model_from_header, save_bundle
from fastcm.io.fingerprint import sha256
from fastcm.model import Model


@dataclass(frozen=True)
class Conversion:
    """What was found in a source, and what the check of the bundle showed."""

    kind: str
    header: BundleHeader
    num_parameters: int
    dtypes: dict[str, int]
    checked: Checked
    guesses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One finding a line; guesses begin with "guess:"."""
        header, sampling = self.header, self.header.sampling
        constants = "".join(f", {key} {value}" for key, value in header.preconditioner.items() if key != "kind")
        middle = f", between its steps {', '.join(f'{s:.4g}' for s in sampling.mid_sigmas)}" if sampling.mid_sigmas else ""
        kept = ", ".join(f"{name} ({number} tensors)" for name, number in self.dtypes.items())
        return [
            f"found: {self.kind}",
            f"network: {describe_network(header)}, {self.num_parameters:,} parameters",
            f"classes: {header.label_dim}, augmentation labels: {header.augment_dim}",
            f"preconditioner: {header.preconditioner['kind']}{constants}",
            *([f"jumps: {header.trajectory['outer']}"] if header.trajectory else []),
            f"sampling: {sampling.sampler}{middle}",
            f"dtype: {kept}; the bundle is float32",
            *(f"note: {note}" for note in self.notes),
            *(f"guess: {guess}" for guess in self.guesses),
            *self.checked.lines(),
        ]


def convert(source: str | Path, file: str | Path, options: Options | None = None, *, preset: str = "") -> Conversion:
    """Make a bundle of a published checkpoint: a .pkl, .pt or safetensors file, or the folder of a diffusers or HF model.

    options: what the file does not tell, before that of ``preset``, the name of one of ``PRESETS``. Nothing in the
    source is executed. The bundle is written whole or not at all, and only when the check of it has passed.
    Raises CheckpointError naming the file, and the key that is missing, unknown, of another shape or not finite, or the
    option that the file contradicts; ConfigError for options that cannot be.
    """
    source, file, options = Path(source), Path(file), options or Options()
    chosen = find_preset(preset)
    place = Path(os.path.realpath(file))
    if os.path.realpath(source) in map(str, (place, *place.parents)) or file.is_dir():
        raise ConfigError(f"{file}: the bundle needs a file of its own, outside of what it is made of; choose another")
    with _naming(source):
        if source.is_dir():
            return _convert_folder(source, file, options, preset)
        if source.name in (INDEX, WEIGHTS, CONFIG_FILE, WEIGHTS_FILE) and _lies_in_known_folder(source):
            raise CheckpointError(f"only all files of its folder tell the model: give the folder itself, {source.parent}")
        weights = read_source(source, options.weights)
        return _convert_file(source, file, weights, recognize(weights, options, chosen))


def _convert_file(source: Path, file: Path, weights: Weights, plan: Plan) -> Conversion:
    kept = dtypes(weights.state)
    header = _header(source, weights, plan, kept)
    with torch.device("meta"):
        skeleton = model_from_header(header, origin=source)
    tensors = plan.layout.ours(weights.state, skeleton.net, skeleton.precond)

    def official(model: Model) -> Mapping[str, Tensor]:
        return plan.layout.official(model.net.state_dict(), model.net, model.precond)

    checked = _write(file, header, tensors, weights.state, official)
    unused = (f"left out: {', '.join(weights.unused)}",) if weights.unused else ()
    changes = f"renamed: {plan.layout.changes()}"
    wide = ("float64 was rounded to float32",) if "float64" in kept else ()
    name = f", weights '{weights.name}'" if weights.name else ""
    kind = f"{plan.kind}, {f'class {weights.class_name}' if weights.class_name else 'a state dict'}{name}"
    return Conversion(kind, header, _count(skeleton), kept, checked, plan.guesses, (changes, *plan.notes, *wide, *unused))


def _header(source: Path, weights: Weights, plan: Plan, kept: Mapping[str, int]) -> BundleHeader:
    record = _record(source, source, plan.kind) | layout_record(plan.layout, kept)
    return BundleHeader(
        network=plan.network.model_dump(mode="json"),
        image_shape=plan.image_shape,
        label_dim=plan.label_dim,
        augment_dim=plan.augment_dim,
        preconditioner=plan.preconditioner,
        sampling=plan.sampling,
        emas=ONLY_NET,
        trained={"phase": "imported", "images": 0, "weights": weights.name or "net", SOURCE: record},
        trajectory=plan.trajectory,
    )


def _convert_folder(source: Path, file: Path, options: Options, preset: str) -> Conversion:
    """A folder says all of itself; only the sampling may be told otherwise."""
    kind = _folder_kind(source)
    extra = [*(["--preset"] if preset else []), *(Told.flag(name) for name in options.given() if name != "mid_sigmas")]
    if extra:
        raise ConfigError(f"{extra[0]} was given, but a folder says all of its model itself; only --mid-sigma can be chosen")
    model, header = import_diffusers(source) if kind == "diffusers" else import_hub(source)
    header = replace(header, sampling=with_mid_sigmas(header.sampling, options.mid_sigmas))
    weights = next(path for path in (source / "unet" / WEIGHTS, source / WEIGHTS, source / WEIGHTS_FILE) if path.is_file())
    record = header.trained.get(SOURCE, {}) | _record(source, weights, kind)
    header = replace(header, trained={**header.trained, SOURCE: record})
    state = model.net.state_dict()
    checked = _write(file, header, state, state, lambda written: written.net.state_dict())
    return Conversion(f"{kind} folder", header, _count(model), dtypes(state), checked)


def _folder_kind(folder: Path) -> str:
    """Whose folder it is, "diffusers" or "hf". Raises CheckpointError for other folders."""
    kind = _known_folder(folder)
    if kind:
        return kind
    if (folder / WEIGHTS_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError("it is a run folder of fastcm: there is nothing to convert; load it as it is")
    raise CheckpointError(f"no {INDEX}, {UNET} or {CONFIG_FILE} of a known model is in this folder")


def _lies_in_known_folder(file: Path) -> bool:
    """Whether it is part of a folder of another library; a config.json of anybody else's says nothing of the file."""
    try:
        return bool(_known_folder(file.parent))
    except CheckpointError:
        return False


def _known_folder(folder: Path) -> str:
    """The same, and "" for other folders."""
    if (folder / INDEX).is_file() or (folder / UNET).is_file():
        return "diffusers"
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if config.get("_class_name") == UNET_CLASS:
        return "diffusers"
    return "hf" if config.get("library_name") == LIBRARY else ""


def _write(
    file: Path,
    header: BundleHeader,
    tensors: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    official: Callable[[Model], Mapping[str, Tensor]],
) -> Checked:
    with atomic_path(file) as unfinished:
        save_bundle(unfinished, header, as_float32(tensors), {})
        return check_bundle(unfinished, source, official)


def _record(source: Path, weights: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "file": source.name, "sha256": sha256(weights)}


def _count(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.net.parameters())


def describe_network(header: BundleHeader) -> str:
    """Family and sizes of a header's network, in words."""
    channels, height, width = header.image_shape
    network = header.network
    attention = ", ".join(map(str, network["attn_resolutions"])) or "none"
    multiples = ", ".join(map(str, network["channel_mult"]))
    sizes = f"{network['model_channels']} x ({multiples}) channels, blocks a level: {network['num_blocks']}"
    return f"{network['family']}, {channels}x{height}x{width}, {sizes}, attention at {attention}"


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Errors begin with the name of the source."""
    try:
        yield
    except FastcmError as error:
        if str(source) in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error
