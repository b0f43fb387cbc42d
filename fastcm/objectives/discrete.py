"""Discrete consistency models on a grid of noise levels: CD and CT (arXiv 2303.01469), iCT (arXiv 2310.14189).

One class holds all that they choose; each method is that class with its own defaults.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fastcm.diffusion.consistency import WEIGHTS, consistency_weight
from fastcm.diffusion.grid import Grid, ScaleSchedule
from fastcm.diffusion.preconditioners import EDMBoundary, Preconditioner
from fastcm.errors import ConfigError
from fastcm.kernels.philox import PhiloxKey
from fastcm.objectives.base import LossTerms, Networks, Objective, TrainingBatch, dropout_key, noise_key
from fastcm.objectives.consistency import noise_pair, pair_loss, solver_pair
from fastcm.objectives.distances import ALL_DISTANCES
from fastcm.random import Stream

SOLVERS = ("none", "euler", "heun")
INDICES = ("uniform", "lognormal")
TARGETS = ("student", "fixed", "adaptive")


@dataclass(frozen=True, kw_only=True)
class DiscreteConsistency(Objective):
    """weight d(D(x_i; sigma_i), D_target(x_(i+1); sigma_(i+1))) for neighbours of Karras' grid, sigma_i > sigma_(i+1).

    sigma_min, sigma_max, rho: the grid; D is the identity at sigma_min (``EDMBoundary``).
    scales, start_scales, end_scales, scales_images: how many levels it has, see ``ScaleSchedule``.
    indices: i is "uniform" or from the discretised "lognormal" (p_mean, p_std).
    solver: x_(i+1) shares the noise of x_i ("none") or is one "euler" or "heun" step of the teacher.
    target: the network of D_target: the "student" itself, or its moving average with target_halflife_images, "fixed" or
    "adaptive", proportional to the number of grid intervals: half-life = target_halflife_images N' / start_scales. That is
    mu(k) = exp(s0 ln mu0 / N') of arXiv 2303.01469, Appendix C, with target_halflife_images = -batch ln 2 / ln mu0.
    distance, c: one of ``ALL_DISTANCES`` and the pseudo-Huber constant. weight: one of ``WEIGHTS``.
    Raises ConfigError for a value that cannot work.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    scales: Literal["fixed", "progressive", "doubling"] = "fixed"
    start_scales: int = 2
    end_scales: int = 18
    scales_images: int = 1
    indices: Literal["uniform", "lognormal"] = "uniform"
    p_mean: float = -1.1
    p_std: float = 2.0
    solver: Literal["none", "euler", "heun"] = "none"
    target: Literal["student", "fixed", "adaptive"] = "student"
    target_halflife_images: float = 0.0
    distance: str = "squared"
    c: float = 0.0
    weight: str = "uniform"

    precond: Preconditioner = field(init=False, repr=False, compare=False)
    grid: Grid = field(init=False, repr=False, compare=False)
    scale_schedule: ScaleSchedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {"indices": INDICES, "solver": SOLVERS, "target": TARGETS, "distance": ALL_DISTANCES, "weight": WEIGHTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.target != "student" and self.target_halflife_images <= 0:
            raise ConfigError(
                f"target_halflife_images: a target of the kind '{self.target}' needs its half-life in images, got "
                f"{self.target_halflife_images}; 0.95 a step of 2048 images is 27,675"
            )
        schedule = ScaleSchedule(self.scales, self.start_scales, self.end_scales, self.scales_images)
        object.__setattr__(self, "precond", EDMBoundary(self.sigma_data, self.sigma_min))
        object.__setattr__(self, "grid", Grid(self.sigma_min, self.sigma_max, self.rho))
        object.__setattr__(self, "scale_schedule", schedule)

    @property
    def needs_teacher(self) -> bool:
        """Whether a step of the teacher finds x_(i+1)."""
        return self.solver != "none"

    def schedule(self, images: int) -> dict[str, float]:
        """{"num_levels": N}, the levels of the grid after this many images of the phase."""
        return {"num_levels": float(self.scale_schedule.num_levels(images))}

    def target_halflife(self, images: int) -> float | None:
        """Half-life of the target network in images; None where the student is its own target."""
        if self.target == "student":
            return None
        adaptive = self.scale_schedule.num_intervals(images) / self.start_scales if self.target == "adaptive" else 1.0
        return self.target_halflife_images * adaptive

    def loss(self, networks: Networks, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image; index, noise and dropout masks from the streams "sigma", "noise" and "dropout"."""
        draw_N, num_levels = Stream(seed, "sigma").uniform(batch.index), schedule["num_levels"]
        if self.indices == "uniform":
            index_N = self.grid.uniform_index(draw_N, num_levels)
        else:
            index_N = self.grid.lognormal_index(draw_N, num_levels, self.p_mean, self.p_std)
        return self.loss_at(networks, batch, index_N, num_levels, noise_key(batch, seed), dropout_key(batch, seed))

    def loss_at(
        self,
        networks: Networks,
        batch: TrainingBatch,
        index_N: Float[Tensor, " N"],
        num_levels: Float[Tensor, ""] | float,
        noise: PhiloxKey | Float[Tensor, "N C H W"],
        dropout: PhiloxKey | None = None,
    ) -> LossTerms:
        """The loss of each image for given places in the grid, with unit normal noise or the key to draw it."""
        student = networks.student
        t_N, r_N = self.grid.sigma(index_N, num_levels), self.grid.sigma(index_N + 1, num_levels)
        points = (batch.images, noise, t_N, r_N, self.precond)
        if self.needs_teacher:
            order = {"second_order": self.solver == "heun"}
            pair = solver_pair(*points, networks.teacher, batch.labels, **order, dtype=student.dtype)
        else:
            pair = noise_pair(*points, student.dtype)
        loss_N = pair_loss(
            student,
            student if self.target == "student" else networks.target,
            pair,
            batch,
            consistency_weight(t_N, r_N, self.weight, self.sigma_data),
            distance=self.distance,
            c=self.c,
            dropout=dropout,
            perceptual=networks.perceptual,
        )
        return LossTerms(loss_N, t_N, {})


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation(DiscreteConsistency):
    """CD: the pair lies on a trajectory of a diffusion teacher; arXiv 2303.01469, Algorithm 2."""

    solver: Literal["none", "euler", "heun"] = "heun"


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining(DiscreteConsistency):
    """CT: no teacher, a grid that becomes finer and a target that becomes slower; arXiv 2303.01469, Algorithm 3."""

    scales: Literal["fixed", "progressive", "doubling"] = "progressive"
    end_scales: int = 150
    target: Literal["student", "fixed", "adaptive"] = "adaptive"
    target_halflife_images: float = 3368.35


@dataclass(frozen=True, kw_only=True)
class ImprovedConsistencyTraining(DiscreteConsistency):
    """iCT: the student as its own target, pseudo-Huber, lognormal noise levels, doubling; arXiv 2310.14189, Table 1."""

    scales: Literal["fixed", "progressive", "doubling"] = "doubling"
    start_scales: int = 10
    end_scales: int = 1280
    indices: Literal["uniform", "lognormal"] = "lognormal"
    target: Literal["student", "fixed", "adaptive"] = "student"
    distance: str = "pseudo_huber"
    c: float = 0.03
    weight: str = "inverse_gap"
