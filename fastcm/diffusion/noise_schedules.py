"""Noise schedules sigma(t), signal scalings s(t) and the grids of noise levels that samplers walk down.

arXiv 2206.00364: x(t) = s(t) (y + sigma(t) n), Table 1. Grids are fp64 and end in 0.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.errors import ConfigError


class Schedule(Protocol):
    """A noise schedule sigma(t), its derivative and its inverse, for tensors of any shape."""

    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sigma(t)."""
        ...

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d sigma / dt."""
        ...

    def inverse(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The t with sigma(t) = sigma."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """sigma(t) = t, EDM's choice; arXiv 2206.00364, Table 1."""

    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sigma(t)."""
        return t

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d sigma / dt."""
        return torch.ones_like(t)

    def inverse(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The t with sigma(t) = sigma."""
        return sigma


@dataclass(frozen=True)
class VESchedule:
    """sigma(t) = sqrt(t); arXiv 2206.00364, Table 1, column VE."""

    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sigma(t)."""
        return t.sqrt()

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d sigma / dt."""
        return 0.5 / t.sqrt()

    def inverse(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The t with sigma(t) = sigma."""
        return sigma**2


def vp_sigma(t: Float[Tensor, "*shape"], beta_d: float, beta_min: float) -> Float[Tensor, "*shape"]:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1); arXiv 2206.00364, Table 1, column VP."""
    return (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()


def vp_time(sigma: Float[Tensor, "*shape"], beta_d: float, beta_min: float) -> Float[Tensor, "*shape"]:
    """The inverse, t = (sqrt(beta_min^2 + 2 beta_d ln(sigma^2 + 1)) - beta_min) / beta_d, in a form without cancellation."""
    log = (sigma**2).log1p()
    return 2 * log / ((beta_min**2 + 2 * beta_d * log).sqrt() + beta_min)


@dataclass(frozen=True)
class VPSchedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1); arXiv 2206.00364, Table 1, column VP."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """sigma(t)."""
        return vp_sigma(t, self.beta_d, self.beta_min)

    def sigma_at(self, t: float) -> float:
        """sigma(t) of one number."""
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """d sigma / dt = (beta_min + beta_d t) (sigma + 1 / sigma) / 2."""
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def inverse(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The t with sigma(t) = sigma."""
        return vp_time(sigma, self.beta_d, self.beta_min)

    @classmethod
    def through(cls, epsilon: float, sigma_min: float, sigma_max: float) -> "VPSchedule":
        """The schedule with sigma(epsilon) = sigma_min and sigma(1) = sigma_max; two equations linear in the betas."""
        log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (log_min / epsilon - log_max) / (epsilon - 1)
        return cls(beta_d, log_max - 0.5 * beta_d)


class Scaling(Protocol):
    """The signal scaling s of a schedule as a function of t."""

    def scale(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """s(t)."""
        ...

    def log_derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(ds / dt) / s."""
        ...


@dataclass(frozen=True)
class NoScaling:
    """s(t) = 1; arXiv 2206.00364, Table 1, columns VE and EDM."""

    def scale(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """s(t)."""
        return torch.ones_like(t)

    def log_derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(ds / dt) / s."""
        return torch.zeros_like(t)


@dataclass(frozen=True)
class VPScaling:
    """s(t) = 1 / sqrt(1 + sigma(t)^2), unit variance for unit-variance data; arXiv 2206.00364, Table 1, column VP."""

    schedule: Schedule

    def scale(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """s(t)."""
        return (1 + self.schedule.sigma(t) ** 2).rsqrt()

    def log_derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(ds / dt) / s = -sigma sigma' s^2."""
        return -self.schedule.sigma(t) * self.schedule.derivative(t) * self.scale(t) ** 2


def with_zero(sigmas: Float64[Tensor, " S"]) -> Float64[Tensor, " S1"]:
    """The grid with the final 0 that samplers end in."""
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def karras_sigmas(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
) -> Float64[Tensor, " S1"]:
    """EDM's grid, dense at low noise: num_steps levels from sigma_max down to sigma_min, then 0.

    sigma_i = (sigma_max^(1/rho) + i / (S - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < S = num_steps;
    arXiv 2206.00364, Eq. 5. A single step is sigma_max. Raises ConfigError for a grid that does not descend.
    """
    check_range(num_steps, sigma_min, sigma_max)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return with_zero((high + ramp(num_steps, device) * (low - high)) ** rho)


def vp_sigmas(
    num_steps: int, schedule: VPSchedule, epsilon: float = 1e-3, device: torch.device | str | None = None
) -> Float64[Tensor, " S1"]:
    """The VP grid: sigma(t_i) at t_i = 1 + i / (S - 1) (epsilon - 1), then 0; arXiv 2206.00364, Table 1."""
    return with_zero(schedule.sigma(1 + ramp(num_steps, device) * (epsilon - 1)))


def ve_sigmas(
    num_steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0, device: torch.device | str | None = None
) -> Float64[Tensor, " S1"]:
    """The VE grid: sigma_i^2 = sigma_max^2 (sigma_min^2 / sigma_max^2)^(i / (S - 1)), then 0; arXiv 2206.00364, Table 1."""
    check_range(num_steps, sigma_min, sigma_max)
    return with_zero(sigma_max * (sigma_min / sigma_max) ** ramp(num_steps, device))


def iddpm_sigmas(
    num_steps: int, levels: Float64[Tensor, " M1"], sigma_min: float = 0.002, sigma_max: float = 81.0
) -> Float64[Tensor, " S1"]:
    """The iDDPM grid: num_steps of the levels u_j in [sigma_min, sigma_max] at evenly spaced j, then 0.

    arXiv 2206.00364, Table 1; ``levels`` is the descending table of ``IDDPM.levels``. How many levels lie in the range
    is counted on the host. Raises ConfigError when the range holds none.
    """
    check_range(num_steps, sigma_min, sigma_max)
    usable = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(usable) == 0:
        raise ConfigError(f"no iDDPM noise level lies in [{sigma_min}, {sigma_max}]; widen the range")
    return with_zero(usable[((len(usable) - 1) * ramp(num_steps, levels.device)).round().long()])


def ramp(num_steps: int, device: torch.device | str | None = None) -> Float64[Tensor, " S"]:
    """i / (S - 1) for i < S; the single value 0 for S = 1."""
    return torch.arange(num_steps, dtype=torch.float64, device=device) / max(num_steps - 1, 1)


def check_range(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    """Raise ConfigError unless there is at least one step and 0 < sigma_min < sigma_max."""
    if num_steps < 1:
        raise ConfigError(f"a sampling grid of {num_steps} steps is impossible; ask for at least 1")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ConfigError(f"a sampling grid needs 0 < sigma_min < sigma_max, got sigma_min {sigma_min}, sigma_max {sigma_max}")
