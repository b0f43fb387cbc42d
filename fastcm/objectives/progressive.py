"""Progressive distillation: a student learns two steps of its teacher in one, then becomes the teacher; arXiv 2202.00512."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fastcm import ops
from fastcm.diffusion.consistency import WEIGHTS, consistency_weight
from fastcm.diffusion.grid import Grid
from fastcm.diffusion.preconditioners import EDM, Preconditioner
from fastcm.errors import ConfigError
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import per_image
from fastcm.objectives.base import LossTerms, Networks, Objective, TrainingBatch, dropout_key, noise_key
from fastcm.objectives.consistency import ode_step
from fastcm.random import Stream


@dataclass(frozen=True, kw_only=True)
class ProgressiveDistillation(Objective):
    """lambda(sigma) ||D(x_t; t) - target||^2, the target being where one Euler step to r ends as two of the teacher's do.

    t = sigma_i and r = sigma_(i+1) are neighbours of Karras' grid with N steps, the teacher stops at sigma_(i+1/2) between
    them. Euler's step gives x_r = (r / t) x_t + (1 - r / t) D, so target = (x_r - (r / t) x_t) / (1 - r / t);
    arXiv 2202.00512, Algorithm 2, in the variables of arXiv 2206.00364. After each stage_images N is halved, down to
    end_steps, the student becomes the teacher and the learning rate is annealed anew.
    Raises ConfigError for a value that cannot work.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    start_steps: int = 64
    end_steps: int = 1
    stage_images: int = 25_600_000
    weight: str = "truncated_snr"

    precond: Preconditioner = field(init=False, repr=False, compare=False)
    grid: Grid = field(init=False, repr=False, compare=False)

    needs_teacher = True

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ConfigError(f"weight: expected one of {', '.join(WEIGHTS)}, got {self.weight!r}")
        if not 1 <= self.end_steps <= self.start_steps or self.stage_images < 1:
            raise ConfigError(
                f"expected 1 <= end_steps <= start_steps and stage_images above 0, got {self.end_steps}, "
                f"{self.start_steps} and {self.stage_images}"
            )
        if self.end_steps << self._halvings(self.stage_images * self.start_steps) != self.start_steps:
            raise ConfigError(f"start_steps {self.start_steps} halved any number of times is never end_steps {self.end_steps}")
        object.__setattr__(self, "precond", EDM(self.sigma_data))
        object.__setattr__(self, "grid", Grid(self.sigma_min, self.sigma_max, self.rho))

    def _halvings(self, images: int) -> int:
        """How often N has been halved after this many images."""
        return min(images // self.stage_images, (self.start_steps // self.end_steps).bit_length() - 1)

    def stage(self, images: int, duration_images: int) -> range:
        """The images with one N; the last N is trained to the end of the phase."""
        first = self._halvings(images) * self.stage_images
        following = first + self.stage_images
        is_last = self._halvings(following) == self._halvings(first)
        return range(first, duration_images if is_last else min(following, duration_images))

    def sampling_steps(self, images: int) -> int:
        """N."""
        return self.start_steps >> self._halvings(images)

    def schedule(self, images: int) -> dict[str, float]:
        """{"num_steps": N} of the student's grid after this many images of the phase."""
        return {"num_steps": float(self.sampling_steps(images))}

    def loss(self, networks: Networks, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image; index, noise and dropout masks from the streams "sigma", "noise" and "dropout"."""
        num_levels = schedule["num_steps"] + 1
        index_N = self.grid.uniform_index(Stream(seed, "sigma").uniform(batch.index), num_levels)
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
        student, teacher = networks.student, networks.teacher
        t_N, mid_N, r_N = (self.grid.sigma(index_N + part, num_levels) for part in (0, 0.5, 1))
        scalings = self.precond.scalings(t_N)
        noised = ops.add_noise(batch.images, noise, t_N, scalings.c_in, dtype=student.dtype)
        with torch.no_grad():
            x_mid = ode_step(teacher, noised.x_t, t_N, mid_N, batch.labels, second_order=False)
            x_r = ode_step(teacher, x_mid, mid_N, r_N, batch.labels, second_order=False)
            ratio = per_image(r_N / t_N)
            target = (x_r - ratio * noised.x_t) / (1 - ratio)
        F_NCHW = student.from_input(noised.input_t, scalings.c_noise, batch.labels, batch.augment, dropout)
        weight_N = consistency_weight(t_N, r_N, self.weight, self.sigma_data)
        loss_N = ops.consistency_loss(F_NCHW, noised.x_t, scalings.c_skip, scalings.c_out, target, weight_N, distance="squared")
        return LossTerms(loss_N, t_N, {})
