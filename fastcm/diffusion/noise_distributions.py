"""How diffusion training draws noise levels and weights its errors: EDM, VP and VE (arXiv 2206.00364, Table 1).

Each is a frozen dataclass: ``sigma`` maps one random number per image to a noise level, ``weight`` is lambda(sigma).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fastcm.diffusion.noise_schedules import vp_sigma


class NoiseDistribution(Protocol):
    """Which numbers ``sigma`` wants ("normal" or "uniform" in [0, 1)), the noise level they give and its weight."""

    draw: ClassVar[Literal["normal", "uniform"]]

    def sigma(self, draw_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The noise levels."""
        ...

    def weight(self, sigma_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """lambda(sigma), the factor of the squared error."""
        ...


def lognormal_sigma(normal_N: Float[Tensor, " N"], p_mean: float, p_std: float) -> Float[Tensor, " N"]:
    """exp(P_mean + P_std n), not clipped; arXiv 2206.00364, Table 1, row "Noise distribution"."""
    return (p_mean + p_std * normal_N).exp()


@dataclass(frozen=True)
class LogNormalNoise:
    """EDM: ln sigma ~ N(P_mean, P_std^2), lambda = (s^2 + sd^2) / (s sd)^2; arXiv 2206.00364, Table 1."""

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    draw: ClassVar[Literal["normal", "uniform"]] = "normal"

    def sigma(self, draw_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The noise levels."""
        return lognormal_sigma(draw_N, self.p_mean, self.p_std)

    def weight(self, sigma_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """lambda(sigma)."""
        return (sigma_N**2 + self.sigma_data**2) / (sigma_N * self.sigma_data) ** 2


@dataclass(frozen=True)
class VPNoise:
    """VP: sigma(t) at t = 1 + u (epsilon_t - 1), uniform in (epsilon_t, 1], lambda = 1 / s^2; arXiv 2206.00364, Table 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    draw: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def sigma(self, draw_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The noise levels."""
        return vp_sigma(1 + draw_N * (self.epsilon_t - 1), self.beta_d, self.beta_min)

    def weight(self, sigma_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """lambda(sigma)."""
        return 1 / sigma_N**2


@dataclass(frozen=True)
class VENoise:
    """VE: ln sigma uniform in [ln sigma_min, ln sigma_max), lambda = 1 / s^2; arXiv 2206.00364, Table 1."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    draw: ClassVar[Literal["normal", "uniform"]] = "uniform"

    def sigma(self, draw_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The noise levels."""
        return self.sigma_min * torch.pow(self.sigma_max / self.sigma_min, draw_N)

    def weight(self, sigma_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """lambda(sigma)."""
        return 1 / sigma_N**2
