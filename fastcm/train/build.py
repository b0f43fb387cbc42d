"""From a configuration to the objects that train: device, precision, data, objective."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from fastcm import backends, ops
from fastcm.config import (
    BundleNetworkConfig,
    ComputeConfig,
    Config,
    CTMObjectiveConfig,
    DataConfig,
    ECTObjectiveConfig,
    EDMObjectiveConfig,
    NetworkConfig,
    ObjectiveConfig,
    PDObjectiveConfig,
)
from fastcm.data.dataset import ResidentDataset, load_resident
from fastcm.data.sources import Source, open_source
from fastcm.diffusion.preconditioners import PRECONDITIONERS
from fastcm.errors import ConfigError
from fastcm.io.bundle import read_header, resolve_bundle
from fastcm.model import SamplingDefaults
from fastcm.objectives import OBJECTIVES, Objective


def select_device(name: str) -> torch.device:
    """The device that ``compute.device`` means; raises ConfigError for CUDA without a usable GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device is 'cuda', but torch sees no CUDA device: use 'cpu' or 'auto', or mend the driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the rest of the process.

    By default it returns the top of the heap to the system at the end of every training step, which then faults its pages in
    one by one again: a tenth of a small step on a CPU.
    """
    trim_threshold, mmap_threshold, limit = -1, -3, 2**30  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, limit)
        libc.mallopt(mmap_threshold, limit)


@contextmanager
def compute_settings(config: ComputeConfig) -> Iterator[None]:
    """Set the kernels' backend, the CPU threads, and whether fp32 convolutions and matrix products may use TF32, for a block.

    A backend named in the environment (FASTCM_BACKEND) stands where the configuration says "auto".
    """
    keep_freed_memory()
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before, threads = [place.fp32_precision for place in places], torch.get_num_threads()
    for place in places:
        place.fp32_precision = "tf32" if config.tf32 else "ieee"
    torch.set_num_threads(config.threads or threads)
    backend = backends.requested() if config.backend == backends.AUTO else config.backend
    try:
        with ops.use_backend(backend, strict=True if config.strict else None):
            yield
    finally:
        torch.set_num_threads(threads)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def resolve_network(config: Config) -> Config:
    """The configuration with the network of the first phase's bundle where it asks for that, else as it is.

    Raises ConfigError where that phase begins from no bundle, CheckpointError for one that is missing or damaged.
    """
    if not isinstance(config.network, BundleNetworkConfig):
        return config
    name, first = next(iter(config.phases.items()))
    if first.init in ("previous", "fresh"):
        raise ConfigError(f"network.family is 'bundle', but phases.{name}.init names no bundle to take the network from")
    path = resolve_bundle(Path(first.init))
    network = TypeAdapter(NetworkConfig).validate_python(read_header(path).network)
    return config.model_copy(update={"network": network})


def open_dataset(config: DataConfig, device: torch.device) -> ResidentDataset:
    """Open, decode and check every image of the configured data set; it lives on the training device.

    Raises DataError naming what is damaged, and ConfigError, as ``open_images`` does.
    """
    return load_resident(open_images(config), device=device)


def open_images(config: DataConfig) -> Source:
    """The configured data set, its images not read yet.

    Raises DataError for files that are missing or damaged, ConfigError where a conditional network has no labels to learn
    from.
    """
    source = open_source(
        config.kind, config.path, resolution=config.resolution, labels=config.conditional, download=config.download
    )
    if config.conditional and not source.label_dim:
        raise ConfigError(f"data.conditional is true, but {source.name} has no labels")
    return source


def check_objectives(config: Config) -> None:
    """Build the objective of every phase, and let it go; raises ConfigError naming the phase of one that cannot work."""
    for name, phase in config.phases.items():
        try:
            build_objective(phase.objective)
        except ConfigError as error:
            raise ConfigError(f"phases.{name}.objective: {error}") from None


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a phase's section describes."""
    return OBJECTIVES[config.kind](**config.model_dump(exclude={"kind", "mid_sigmas", "gamma", "gan"}))


def sampling_form(config: ObjectiveConfig) -> tuple[dict[str, Any], SamplingDefaults]:
    """Preconditioner (as a bundle stores it) and default sampler of the model that a phase trains."""
    precond = build_objective(config).sampling_precond
    kind = next(name for name, form in PRECONDITIONERS.items() if form is type(precond))
    return {"kind": kind, **asdict(precond)}, _sampling_defaults(config)


def _sampling_defaults(config: ObjectiveConfig) -> SamplingDefaults:
    if isinstance(config, EDMObjectiveConfig):
        return SamplingDefaults("heun")
    if isinstance(config, ECTObjectiveConfig):
        return SamplingDefaults("consistency", config.mid_sigmas)
    grid = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "rho": config.rho}
    if isinstance(config, PDObjectiveConfig):
        return SamplingDefaults("euler", **grid)
    if isinstance(config, CTMObjectiveConfig):
        return SamplingDefaults("trajectory", config.mid_sigmas, gamma=config.gamma, **grid)
    # Discrete consistency models return to a noise level from sigma_min, where their output lies; ECT from 0.
    return SamplingDefaults("consistency", config.mid_sigmas, config.sigma_min, **grid)
