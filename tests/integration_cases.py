"""Models with random weights through which signals of unit size pass, for the tests of foreign layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastcm.io.bundle import BundleHeader, model_from_header, save_bundle
from fastcm.model import Model, SamplingDefaults

BOUNDARY = {"kind": "edm_boundary", "sigma_data": 0.5, "sigma_min": 0.002}
# A 16x16 network of OpenAI's family with attention at 8x8, 64 channels wide.
SMALL = {"family": "openai", "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}


def header_of(network: dict[str, Any] = SMALL, **changes: Any) -> BundleHeader:
    """The header of a bundle of such a network."""
    sampling = SamplingDefaults("consistency", (0.8,), 0.002)
    trained = {"phase": "tune", "images": 7}
    header = BundleHeader(network, (3, 16, 16), 0, 0, BOUNDARY, sampling, ("main",), trained)
    return replace(header, **changes)


def model_of(header: BundleHeader, seed: int = 0) -> Model:
    """The model that a header describes; no parameter is zero or one, so that a lost or exchanged one shows."""
    model = model_from_header(header, origin=Path("header")).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.net.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        is_gain = "norm" in name and name.endswith("weight")
        value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2 * noise + is_gain)
    return model.eval()


def write_bundle(path: Path, header: BundleHeader) -> tuple[Model, Model]:
    """A bundle whose raw weights and average "main" differ; returns the models with the average and with the raw weights."""
    averaged, raw = model_of(header, seed=1), model_of(header, seed=2)
    save_bundle(path, header, raw.net.state_dict(), {"main": dict(averaged.net.named_parameters())})
    return averaged, raw


def images(num: int, seed: int = 5) -> torch.Tensor:
    """Unit normal images of 3x16x16."""
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
