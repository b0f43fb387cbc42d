"""EDM's generalised sampler: any schedule, scaling, grid and second-order method (arXiv 2206.00364, Algorithms 1 to 3).

It solves the probability flow ODE of x(t) = s(t) (y + sigma(t) n) in t, where ``sample_heun`` has sigma(t) = t, s(t) = 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fastcm.diffusion.noise_schedules import (
    LinearSchedule,
    NoScaling,
    Scaling,
    Schedule,
    VESchedule,
    VPScaling,
    VPSchedule,
    iddpm_sigmas,
    karras_sigmas,
    ve_sigmas,
    vp_sigmas,
)
from fastcm.diffusion.preconditioners import IDDPM
from fastcm.errors import ConfigError
from fastcm.sampling.churn import Churn
from fastcm.sampling.common import Callback, Denoiser, NoiseSource, clip_range, denoise, report, round_sigmas, start


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The choices of the generalised sampler, each a row of arXiv 2206.00364, Table 1.

    solver: "euler" (first order) or "heun". discretization: the grid, "vp", "ve", "iddpm" or "edm". schedule: sigma(t),
    "linear", "vp" or "ve". scaling: s(t), "none" or "vp". sigma_min, sigma_max: ends of the grid, None for the usual
    ones of the discretization; the model's range clips them. rho: of the edm grid. epsilon_s: smallest t of the vp grid.
    C_1, C_2, M: of the iddpm grid. alpha: where the second evaluation of a step lies, 1 for Heun's trapezoid rule.
    """

    solver: Literal["euler", "heun"] = "heun"
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm"
    schedule: Literal["linear", "vp", "ve"] = "linear"
    scaling: Literal["none", "vp"] = "none"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    epsilon_s: float = 1e-3
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000
    alpha: float = 1.0

    def __post_init__(self) -> None:
        known = {
            "solver": ("euler", "heun"),
            "discretization": ("vp", "ve", "iddpm", "edm"),
            "schedule": ("linear", "vp", "ve"),
            "scaling": ("none", "vp"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")

    def sigma_range(self, model: Denoiser) -> tuple[float, float]:
        """(sigma_min, sigma_max) of the grid within the model's range."""
        usual = {
            "vp": (VPSchedule().sigma_at(self.epsilon_s), VPSchedule().sigma_at(1.0)),
            "ve": (0.02, 100.0),
            "iddpm": (0.002, 81.0),
            "edm": (0.002, 80.0),
        }
        low, high = usual[self.discretization]
        low, high = low if self.sigma_min is None else self.sigma_min, high if self.sigma_max is None else self.sigma_max
        return clip_range(model, low, high)

    def sigmas(self, num_steps: int, model: Denoiser, device: torch.device | str | None = None) -> Float64[Tensor, " S1"]:
        """The grid for this model: num_steps noise levels, then 0."""
        low, high = self.sigma_range(model)
        if self.discretization == "vp":
            return vp_sigmas(num_steps, VPSchedule.through(self.epsilon_s, low, high), self.epsilon_s, device)
        if self.discretization == "ve":
            return ve_sigmas(num_steps, low, high, device)
        if self.discretization == "iddpm":
            return iddpm_sigmas(num_steps, IDDPM(self.C_1, self.C_2, self.M).levels(device or "cpu"), low, high)
        return karras_sigmas(num_steps, low, high, self.rho, device)

    def curves(self, model: Denoiser) -> tuple[Schedule, Scaling]:
        """sigma(t) and s(t); those of VP have betas that put the ends of the grid at t = epsilon_s and t = 1."""
        vp = VPSchedule.through(self.epsilon_s, *self.sigma_range(model))
        schedule = {"linear": LinearSchedule(), "ve": VESchedule(), "vp": vp}[self.schedule]
        return schedule, VPScaling(schedule) if self.scaling == "vp" else NoScaling()


@dataclass(frozen=True)
class _Flow:
    """The probability flow ODE of one model: dx / dt = (sigma' / sigma + s' / s) x - sigma' s / sigma D(x / s; sigma).

    arXiv 2206.00364, Eq. 4 and Algorithm 1, line 4.
    """

    model: Denoiser
    labels: Tensor | None
    schedule: Schedule
    scaling: Scaling

    def slope(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(dx / dt, denoised image)."""
        sigma, scale = self.schedule.sigma(t), self.scaling.scale(t)
        growth = self.schedule.derivative(t) / sigma
        denoised = denoise(self.model, x / scale, sigma, self.labels)
        return (growth + self.scaling.log_derivative(t)) * x - growth * scale * denoised, denoised

    def raise_noise(self, x: Tensor, t: Tensor, t_hat: Tensor, churn: Churn, noise: Tensor | None) -> Tensor:
        """x moved from t to t_hat by fresh noise."""
        scale_hat = self.scaling.scale(t_hat)
        x = scale_hat / self.scaling.scale(t) * x
        if noise is None:
            return x
        return x + churn.standard_deviation(self.schedule.sigma(t), self.schedule.sigma(t_hat)) * scale_hat * noise.double()


@torch.no_grad()
def sample_ablation(
    model: Denoiser,
    x: Float[Tensor, "N C H W"],
    sigmas: Float[Tensor, " S1"],
    options: Ablation,
    *,
    labels: Tensor | None = None,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Float64[Tensor, "N C H W"]:
    """Walk down the noise levels by Euler's or a second-order method in the t of any schedule and scaling.

    A second-order step evaluates the slope again at t + alpha h and averages with weights 1 - 1 / (2 alpha) and
    1 / (2 alpha); arXiv 2206.00364, Algorithm 3 for alpha, Algorithm 2 for churn.

    x: unit normal noise times sigmas[0], as for every sampler (the signal scaling is applied here). sigmas: usually
    ``options.sigmas(num_steps, model)``. Arguments and errors otherwise as in ``sample_heun``.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    x, sigmas = start(x, sigmas, noise, needs_noise=s_churn > 0)
    schedule, scaling = options.curves(model)
    flow = _Flow(model, labels, schedule, scaling)
    num_steps = len(sigmas) - 1
    t_steps = torch.cat((schedule.inverse(round_sigmas(model, sigmas[:-1])), sigmas[-1:]))
    x = x * scaling.scale(t_steps[0])
    for i in range(num_steps):
        t, t_next = t_steps[i], t_steps[i + 1]
        sigma = schedule.sigma(t)
        sigma_hat = churn.sigma_hat(model, sigma, num_steps)
        t_hat = schedule.inverse(sigma_hat)
        x = flow.raise_noise(x, t, t_hat, churn, noise(i) if s_churn > 0 else None)
        h = t_next - t_hat
        slope, denoised = flow.slope(x, t_hat)
        report(callback, i, x, sigma, sigma_hat, denoised)
        if options.solver == "heun" and i < num_steps - 1:
            t_prime = t_hat + options.alpha * h
            slope_prime, _ = flow.slope(x + options.alpha * h * slope, t_prime)
            share = 1 / (2 * options.alpha)
            slope = (1 - share) * slope + share * slope_prime
        x = x + h * slope
    return x
