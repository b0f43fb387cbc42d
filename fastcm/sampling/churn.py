"""Churn: fresh noise before each step of a sampler (arXiv 2206.00364, Algorithm 2)."""

import math
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.sampling.common import Denoiser, NoiseSource, round_sigmas

MAX_GAMMA = math.sqrt(2) - 1
MAX_S_NOISE = 100.0  # published values are 1.003 and 1.007


@dataclass(frozen=True)
class Churn:
    """Before a step, sigma rises to sigma_hat = sigma (1 + gamma) by noise of standard deviation s_noise.

    gamma = min(s_churn / S, sqrt(2) - 1) for sigma in [s_tmin, s_tmax] and S steps, else 0; arXiv 2206.00364, Algorithm 2,
    lines 4 to 6. Raises ConfigError for a value that cannot work.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name, largest in (("s_churn", math.inf), ("s_noise", MAX_S_NOISE)):
            if not 0 <= getattr(self, name) <= largest or math.isinf(getattr(self, name)):  # so that NaN is refused too
                raise ConfigError(f"{name}: expected a finite number from 0 to {largest:g}, got {getattr(self, name)}")
        if not 0 <= self.s_tmin <= self.s_tmax:
            raise ConfigError(f"s_tmin, s_tmax: expected 0 <= s_tmin <= s_tmax, got {self.s_tmin} and {self.s_tmax}")

    def sigma_hat(self, model: Denoiser, sigma: Float64[Tensor, ""], num_steps: int) -> Float64[Tensor, ""]:
        """The raised noise level, one that the model was trained on, chosen on the device."""
        inside = ((sigma >= self.s_tmin) & (sigma <= self.s_tmax)).to(sigma.dtype)  # a bool would make gamma fp32
        gamma = min(self.s_churn / num_steps, MAX_GAMMA) * inside
        return round_sigmas(model, sigma * (1 + gamma))

    def standard_deviation(self, sigma: Float64[Tensor, ""], sigma_hat: Float64[Tensor, ""]) -> Float64[Tensor, ""]:
        """s_noise sqrt(sigma_hat^2 - sigma^2) of the noise to add, 0 where rounding brought sigma_hat below sigma."""
        return (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * self.s_noise

    def raise_noise(
        self,
        model: Denoiser,
        x: Float64[Tensor, "N C H W"],
        sigma: Float64[Tensor, ""],
        num_steps: int,
        noise: NoiseSource | None,
        i: int,
    ) -> tuple[Float64[Tensor, "N C H W"], Float64[Tensor, ""]]:
        """(x, sigma_hat) before step i of num_steps; without churn x as it is, and no noise is drawn."""
        sigma_hat = self.sigma_hat(model, sigma, num_steps)
        if self.s_churn > 0:
            x = x + self.standard_deviation(sigma, sigma_hat) * noise(i).double()
        return x, sigma_hat
