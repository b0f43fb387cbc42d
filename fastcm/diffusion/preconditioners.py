"""Preconditioners: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) of arXiv 2206.00364, Eq. 7 and Table 1.

Each is a frozen dataclass of its constants. Scalings come back in the dtype of sigma, fp32 or fp64, on its device.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastcm.diffusion.noise_schedules import VPSchedule, vp_time


class Scalings(NamedTuple):
    """The four coefficients of Eq. 7, one value per image."""

    c_skip: Float[Tensor, " N"]
    c_out: Float[Tensor, " N"]
    c_in: Float[Tensor, " N"]
    c_noise: Float[Tensor, " N"]


class Preconditioner(Protocol):
    """What a model needs to know about its network: scalings, and the noise levels it is defined on."""

    @property
    def sigma_min(self) -> float:
        """Smallest noise level to evaluate the network at."""
        ...

    @property
    def sigma_max(self) -> float:
        """Largest noise level to evaluate the network at."""
        ...

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        ...

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest noise levels that the network was trained on."""
        ...


class _Constants:
    """The constants of a preconditioner: ValueError unless all are finite numbers above 0, or sigma_min that is 0."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf or (value == 0 and name != "sigma_min"):  # so that NaN is refused too
                raise ValueError(f"{name} of the preconditioner is {value}, expected a finite number above 0")


class _Continuous(_Constants):
    """A preconditioner whose network takes any noise level."""

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The noise levels themselves."""
        return sigma


@dataclass(frozen=True)
class EDM(_Continuous):
    """The scalings of EDM, which keep input and training target of F at unit variance.

    c_skip = sd^2 / (s^2 + sd^2), c_out = s sd / sqrt(s^2 + sd^2), c_in = 1 / sqrt(s^2 + sd^2), c_noise = ln(s) / 4
    for s = sigma and sd = sigma_data; arXiv 2206.00364, Table 1, last column.
    """

    sigma_data: float = 0.5
    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = math.inf

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        return _edm_scalings(sigma_N, self.sigma_data, 0.0)


@dataclass(frozen=True)
class EDMBoundary(_Continuous):
    """EDM's scalings moved by sigma_min, so that D(x; sigma_min) = x whatever the network says.

    c_skip = sd^2 / ((s - sigma_min)^2 + sd^2), c_out = (s - sigma_min) sd / sqrt(s^2 + sd^2), the others as in EDM;
    arXiv 2303.01469, Appendix C. Networks trained by ECT are evaluated with it (sigma_min 0.003), not trained.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.003
    sigma_max: ClassVar[float] = math.inf

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        return _edm_scalings(sigma_N, self.sigma_data, self.sigma_min)


@dataclass(frozen=True)
class Direct(_Continuous):
    """No scalings but that of the input: D(x; sigma) = F(x / sqrt(s^2 + sd^2); ln(s) / 4) for s = sigma, sd = sigma_data.

    The inner parametrisation "no" of arXiv 2310.02279.
    """

    sigma_data: float = 0.5
    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = math.inf

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        edm = _edm_scalings(sigma_N, self.sigma_data, 0.0)
        return edm._replace(c_skip=torch.zeros_like(sigma_N), c_out=torch.ones_like(sigma_N))


def _edm_scalings(sigma_N: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
    above_N, rms_N = sigma_N - sigma_min, (sigma_N**2 + sigma_data**2).sqrt()
    c_skip_N = sigma_data**2 / (above_N**2 + sigma_data**2)
    return Scalings(c_skip_N, above_N * sigma_data / rms_N, 1 / rms_N, sigma_N.log() / 4)


@dataclass(frozen=True)
class VP(_Continuous):
    """The scalings of DDPM++ (VP) networks, which predict noise and take the time index (M - 1) t.

    c_skip = 1, c_out = -s, c_in = 1 / sqrt(s^2 + 1), c_noise = (M - 1) sigma^-1(s); arXiv 2206.00364, Table 1.
    Defined for t in [epsilon_t, 1].
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def schedule(self) -> VPSchedule:
        """sigma(t) and its inverse."""
        return VPSchedule(self.beta_d, self.beta_min)

    @property
    def sigma_min(self) -> float:
        """sigma(epsilon_t), exactly; the official code has its fp32 rounding, 2 % lower at the defaults."""
        return self.schedule.sigma_at(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        """sigma(1)."""
        return self.schedule.sigma_at(1.0)

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        c_noise_N = (self.M - 1) * vp_time(sigma_N, self.beta_d, self.beta_min)
        return Scalings(torch.ones_like(sigma_N), -sigma_N, 1 / (sigma_N**2 + 1).sqrt(), c_noise_N)


@dataclass(frozen=True)
class VE(_Continuous):
    """The scalings of NCSN++ (VE) networks: c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s / 2); 2206.00364, Table 1."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        one_N = torch.ones_like(sigma_N)
        return Scalings(one_N, sigma_N, one_N, (0.5 * sigma_N).log())


@dataclass(frozen=True)
class IDDPM(_Constants):
    """The scalings of iDDPM and ADM networks, which know M noise levels u_1 .. u_M only.

    c_skip = 1, c_out = -s, c_in = 1 / sqrt(s^2 + 1), c_noise = M - 1 - argmin_j |u_j - s|; arXiv 2206.00364, Table 1.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    @property
    def sigma_min(self) -> float:
        """u_(M-1), the smallest level above 0."""
        return _iddpm_levels(self)[self.M - 1]

    @property
    def sigma_max(self) -> float:
        """u_0."""
        return _iddpm_levels(self)[0]

    def levels(self, device: torch.device | str = "cpu") -> Float[Tensor, " M1"]:
        """The table u_0 > .. > u_M = 0, fp64 [M + 1]: u_(j-1) = sqrt((u_j^2 + 1) / max(ab_(j-1) / ab_j, C_1) - 1) with

        ab_j = sin^2(pi j / (2 M (C_2 + 1))); arXiv 2206.00364, Table 1, row "Time steps".
        """
        return _iddpm_constant(self.C_1, self.C_2, self.M, str(device))

    def index(self, sigma: Float[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """The index j of the level nearest to each sigma."""
        u = self.levels(sigma.device)
        return (sigma.double().reshape(-1, 1) - u).abs().argmin(1).reshape(sigma.shape)

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest levels of the table, in the dtype of ``sigma``."""
        return self.levels(sigma.device)[self.index(sigma)].to(sigma.dtype)

    def scalings(self, sigma_N: Float[Tensor, " N"]) -> Scalings:
        """The coefficients at these noise levels."""
        c_noise_N = (self.M - 1 - self.index(sigma_N)).to(sigma_N.dtype)
        return Scalings(torch.ones_like(sigma_N), -sigma_N, 1 / (sigma_N**2 + 1).sqrt(), c_noise_N)


@lru_cache
def _iddpm_levels(precond: IDDPM) -> tuple[float, ...]:
    # Published networks carry this table in fp32, computed by an fp32 recursion whose rounding reaches 5e-4 of the
    # smallest levels. The same arithmetic gives the same table; exact arithmetic would not.
    j = torch.arange(precond.M + 1)
    alpha_bar = (0.5 * math.pi * j / precond.M / (precond.C_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=precond.C_1)
    u = [torch.zeros(())]
    for step in reversed(ratio):
        u.append(((u[-1] ** 2 + 1) / step - 1).sqrt())
    return tuple(torch.stack(u[::-1]).tolist())


@lru_cache
def _iddpm_table(precond: IDDPM, device: torch.device) -> Tensor:
    """One table per device, so that a sampler copies it there once."""
    return torch.tensor(_iddpm_levels(precond), dtype=torch.float64, device=device)


@torch.compiler.assume_constant_result
def _iddpm_constant(C_1: float, C_2: float, M: int, device: str) -> Tensor:
    """The table as a constant of a compiled graph."""
    return _iddpm_table(IDDPM(C_1, C_2, M), torch.device(device))


PRECONDITIONERS: dict[str, type] = {
    "edm": EDM,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "edm_boundary": EDMBoundary,
    "direct": Direct,
}
