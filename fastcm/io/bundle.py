"""Bundles: one safetensors file with a network, its weight averages and all that is needed to run it.

Tensors are ``net/<parameter>`` and ``ema/<average>/<parameter>``; the header is a ``BundleHeader`` as JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from fastcm.config import BundleNetworkConfig, NetworkConfig
from fastcm.config.section import Positive
from fastcm.diffusion.preconditioners import PRECONDITIONERS
from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import CheckpointError
from fastcm.io.tensors import HEADER_KEY, copy_into, read_json_header, read_metadata, read_tensors, write_tensors
from fastcm.model import Model, SamplingDefaults
from fastcm.nn.build import build_network

FORMAT = 1
MODEL_FILE = "model.safetensors"
FOREIGN = ("model_index.json", "config.json", "unet/config.json")  # what folders of diffusers and Hugging Face have


@dataclass(frozen=True)
class BundleHeader:
    """What a bundle says of itself."""

    network: dict[str, Any]  # a NetworkConfig
    image_shape: tuple[Positive, Positive, Positive]  # (C, H, W)
    label_dim: Annotated[int, Field(ge=0)]
    augment_dim: Annotated[int, Field(ge=0)]
    preconditioner: dict[str, Any]  # {"kind": a name in PRECONDITIONERS, and its arguments}
    sampling: SamplingDefaults
    emas: Annotated[tuple[str, ...], Field(min_length=1)]  # the first one is the default
    trained: dict[str, Any]  # phase, images, configuration hash, data fingerprint
    format: int = FORMAT
    trajectory: dict[str, Any] | None = None  # a ``Trajectory``, of networks with a second time

    def after(self, images: int, sampling_steps: int = 0) -> "BundleHeader":
        """The same header for the state after ``images`` images of its phase, made for this number of steps (0: for any)."""
        sampling = replace(self.sampling, steps=sampling_steps)
        return replace(self, trained={**self.trained, "images": images}, sampling=sampling)


def save_bundle(path: Path, header: BundleHeader, net: Mapping[str, Tensor], emas: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a bundle atomically; an existing file is replaced only when the new one is complete."""
    tensors = {f"net/{name}": value for name, value in net.items()}
    for ema, averages in emas.items():
        tensors |= {f"ema/{ema}/{name}": value for name, value in averages.items()}
    write_tensors(path, tensors, asdict(header))


def read_bundle(path: Path) -> tuple[dict[str, Tensor], BundleHeader]:
    """Tensors and header of a bundle; raises CheckpointError where the file is damaged or of another format."""
    tensors, header = read_tensors(path)
    return tensors, _parse_header(path, header)


def read_header(path: Path) -> BundleHeader:
    """The header of a bundle without its tensors; raises CheckpointError as ``read_bundle`` does."""
    return _parse_header(path, read_json_header(path))


def _parse_header(path: Path, header: dict[str, Any]) -> BundleHeader:
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: bundle format {header.get('format')!r}, this version of fastcm reads format {FORMAT}")
    try:
        return TypeAdapter(BundleHeader).validate_python(header)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged header: {_first(error)}") from None


def _first(invalid: ValidationError) -> str:
    """The first thing that is wrong."""
    error = invalid.errors()[0]
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def resolve_bundle(path: Path) -> Path:
    """The bundle meant by a path: the file itself, or the ``model.safetensors`` of a run folder.

    Raises CheckpointError for a folder that has none, or is one of diffusers or Hugging Face.
    """
    if not path.is_dir():
        return path
    file = path / MODEL_FILE
    foreign = next((name for name in FOREIGN if (path / name).is_file()), "")
    if foreign and not (file.is_file() and HEADER_KEY in read_metadata(file)):
        what = f"a folder of diffusers or Hugging Face (it has {foreign}), not one of fastcm"
        raise CheckpointError(f"{path}: {what}; make a bundle of it: fastcm convert {path} {path.resolve().name}.safetensors")
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MODEL_FILE} in this folder; has the run reached its first snapshot?")
    return file


def load(path: str | Path, *, ema: str = "", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a model from a bundle or a run folder, ready to be called as ``model(x, sigma) -> denoised``.

    Arguments: ema, the name of a weight average, "net" for the raw weights, "" for the bundle's first average; dtype,
    the precision of the network's torso. Raises CheckpointError naming the file and what is wrong with it.
    """
    file = resolve_bundle(Path(path))
    tensors, header = read_bundle(file)
    model = model_from_header(header, dtype=dtype, origin=file)
    name = ema or header.emas[0]
    if name not in (*header.emas, "net"):
        averages = ", ".join(known for known in header.emas if known != "net")
        raise CheckpointError(f"{file}: no weight average '{name}'; it has {f'{averages} and net' if averages else 'net only'}")
    copy_into(model.net.state_dict(), tensors, "net/", file)
    if name != "net":
        copy_into(dict(model.net.named_parameters()), tensors, f"ema/{name}/", file)
    return model.to(device).eval().requires_grad_(False)


def model_from_header(header: BundleHeader, *, dtype: torch.dtype = torch.float32, origin: Path) -> Model:
    """A model of the architecture that a header describes, weights not filled in yet."""
    try:
        network = TypeAdapter(NetworkConfig).validate_python(header.network)
        if isinstance(network, BundleNetworkConfig):
            raise TypeError("network.family is 'bundle', which is for configurations")
        arguments = dict(header.preconditioner)
        kind = arguments.pop("kind")
        precond = PRECONDITIONERS[kind](**TypeAdapter(dict[str, int | float]).validate_python(arguments))
        trajectory = TypeAdapter(Trajectory).validate_python(header.trajectory or {})
    except ValidationError as error:
        raise CheckpointError(f"{origin}: damaged header: {_first(error)}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{origin}: damaged header: {error}") from None
    net = build_network(network, header.image_shape, header.label_dim, header.augment_dim)
    shape, label_dim, sampling = header.image_shape, header.label_dim, header.sampling
    return Model(net, precond, shape, label_dim=label_dim, dtype=dtype, sampling=sampling, trajectory=trajectory)
