"""Guided sampling: a denoiser pushed away from a weaker or unconditional one, for any sampler."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.errors import ConfigError
from fastcm.model import Model, SamplingDefaults


class Guided(nn.Module):
    """D(x; sigma) = D_guide + guidance (D_model - D_guide); arXiv 2406.02507 (autoguidance).

    guide: a weaker version of the model (smaller, trained for less long), an unconditional model, or the model itself with
    drop_labels, which is classifier-free guidance (arXiv 2207.12598, Eq. 6, with guidance = 1 + w). A guide without classes
    is never given labels. guidance: 1 is the model alone, whose guide is not evaluated; 0 the guide alone.

    It has what ``fastcm.sample`` and the samplers ask of a model, taken from the model. Raises ConfigError for a guide of
    another image shape, of other classes, or, without drop_labels, for the model as its own guide.
    """

    def __init__(self, model: Model, guide: Model, guidance: float, *, drop_labels: bool = False) -> None:
        super().__init__()
        if guide.image_shape != model.image_shape:
            raise ConfigError(f"guide: it makes images of shape {guide.image_shape}, the model of {model.image_shape}")
        self.guide_takes_labels = bool(guide.label_dim) and not drop_labels
        if self.guide_takes_labels and guide.label_dim != model.label_dim:
            raise ConfigError(f"guide: it has {guide.label_dim} classes, the model {model.label_dim}; use drop_labels")
        if guide is model and self.guide_takes_labels == bool(model.label_dim):
            raise ConfigError("guide: a model cannot guide itself under the same condition; use drop_labels, or another model")
        self.model, self.guide, self.guidance = model, guide, guidance
        self.image_shape, self.label_dim = model.image_shape, model.label_dim

    @property
    def sampling(self) -> SamplingDefaults:
        """The model's own sampler."""
        return self.model.sampling

    @property
    def sigma_min(self) -> float:
        """Smallest noise level that both are defined on."""
        return max(self.model.sigma_min, self.guide.sigma_min)

    @property
    def sigma_max(self) -> float:
        """Largest noise level that both are defined on."""
        return min(self.model.sigma_max, self.guide.sigma_max)

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest noise levels that the model was trained on."""
        return self.model.round_sigma(sigma)

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        sigma: Float[Tensor, "..."] | float,
        labels: Tensor | None = None,
        **extra: Any,
    ) -> Float[Tensor, "N C H W"]:
        """The guided denoised images, fp32; arguments as for ``Model``."""
        denoised = self.model(x_NCHW, sigma, labels=labels, **extra)
        if self.guidance == 1:
            return denoised
        guide = self.guide(x_NCHW, sigma, labels=labels if self.guide_takes_labels else None, **extra)
        return torch.lerp(guide, denoised, self.guidance)
