"""Consistency objectives: one core for every pair of points on a trajectory, and Easy Consistency Tuning (ECT) on it.

A method chooses the noise levels t > r, how x_r is found, which network is the target, the distance and the weight; the core
evaluates student and target with one dropout mask and gives the loss.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastcm import ops
from fastcm.diffusion.consistency import MAPPINGS, WEIGHTS, consistency_weight, stage_decay, stage_of, t_to_r
from fastcm.diffusion.noise_distributions import lognormal_sigma
from fastcm.diffusion.preconditioners import EDM, EDMBoundary, Preconditioner, Scalings
from fastcm.errors import ConfigError
from fastcm.kernels.consistency_loss import DISTANCES
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import Model
from fastcm.objectives.base import LossTerms, TrainingBatch, dropout_key, noise_key
from fastcm.random import Stream


class Point(NamedTuple):
    """One point of a trajectory per image: its noise level, the scalings there, x, and what the network is given of x."""

    sigma_N: Float[Tensor, " N"]
    scalings: Scalings
    x_NCHW: Float[Tensor, "N C H W"]
    input_NCHW: Float[Tensor, "N C H W"]


class Pair(NamedTuple):
    """Two points of one trajectory per image, at noise levels t and r < t.

    Where ``boundary_N``, r is 0 and the target is the clean image; the second point then holds a stand-in that the network
    can take, and what it makes of it is not used.
    """

    at_t: Point
    at_r: Point
    boundary_N: Bool[Tensor, " N"]


def noise_pair(
    images_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    r_N: Float[Tensor, " N"],
    precond: Preconditioner,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair that shares its noise: x_t = y + t n, x_r = y + r n, an unbiased step along the trajectory.

    arXiv 2303.01469, Eq. 10; n is unit normal noise or the key to draw it, dtype that of the network's input. Rows with
    r = 0 get t in place of r, because c_noise = ln(r) / 4 does not exist there.
    """
    boundary_N = r_N <= 0
    r_N = torch.where(boundary_N, t_N, r_N)
    at_t, at_r = precond.scalings(t_N), precond.scalings(r_N)
    noised = ops.add_noise(images_NCHW, noise, t_N, at_t.c_in, r_N=r_N, c_in_r_N=at_r.c_in, dtype=dtype)
    points = Point(t_N, at_t, noised.x_t, noised.input_t), Point(r_N, at_r, noised.x_r, noised.input_r)
    return Pair(*points, boundary_N)


def pair_loss(
    student: Model,
    target: Model,
    pair: Pair,
    batch: TrainingBatch,
    weight_N: Float[Tensor, " N"],
    *,
    distance: str = "l2",
    c: float = 0.0,
    dropout: PhiloxKey | None = None,
) -> Float[Tensor, " N"]:
    """weight d(D_student(x_t; t), D_target(x_r; r)) per image, with the clean image as the target at the boundary.

    The target has no gradient; student and target see the same dropout masks. arXiv 2406.14548; distances are those
    of ``ops.consistency_loss``.
    """
    conditions = (batch.labels, batch.augment, dropout)
    at_t, at_r = pair.at_t, pair.at_r
    F_t = student.from_input(at_t.input_NCHW, at_t.scalings.c_noise, *conditions)
    with torch.no_grad():
        F_r = target.from_input(at_r.input_NCHW, at_r.scalings.c_noise, *conditions)
    return ops.consistency_loss(
        F_t,
        at_t.x_NCHW,
        at_t.scalings.c_skip,
        at_t.scalings.c_out,
        batch.images,
        weight_N,
        F_r=F_r,
        x_r=at_r.x_NCHW,
        c_skip_r=at_r.scalings.c_skip,
        c_out_r=at_r.scalings.c_out,
        boundary_N=pair.boundary_N,
        distance=distance,
        c=c,
    )


@dataclass(frozen=True, kw_only=True)
class ECT:
    """Easy Consistency Tuning: the network itself, without gradient, is the target at r(t); arXiv 2406.14548.

    ln t ~ N(p_mean, p_std^2), not clipped; r = t (1 - n(t) / q^(stage + 1)) or 0, n(t) = 1 + k sigmoid(-b t) for mapping
    "sigmoid", 1 for "const"; stage = images seen // double_images, at most max_stage. distance "l2" is the norm over an
    image's pixels, "squared" its square, "pseudo_huber" sqrt(norm^2 + c^2) - c. weight "inverse_gap" is 1 / (t - r),
    "snr_plus_one" 1 / t^2 + 1 / sigma_data^2. Training uses EDM's scalings; sampling those with D(x; boundary_sigma) = x.
    Raises ConfigError for a value that cannot work.
    """

    p_mean: float = -1.1
    p_std: float = 2.0
    sigma_data: float = 0.5
    q: float = 2.0
    double_images: int = 3_200_000
    max_stage: int = 1000
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    k: float = 8.0
    b: float = 1.0
    distance: Literal["l2", "squared", "pseudo_huber"] = "l2"
    c: float = 0.0
    weight: Literal["inverse_gap", "snr_plus_one"] = "inverse_gap"
    boundary_sigma: float = 0.003
    # The preconditioners to train and to sample with.
    precond: Preconditioner = field(init=False, repr=False, compare=False)
    sampling_precond: Preconditioner = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, known in (("mapping", MAPPINGS), ("distance", DISTANCES), ("weight", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.q <= 1:
            raise ConfigError(f"q: expected a number above 1, by which each stage divides the gap t - r, got {self.q}")
        if self.double_images < 1 or self.max_stage < 0:
            raise ConfigError(
                f"double_images must be at least 1 and max_stage at least 0, got {self.double_images} and {self.max_stage}"
            )
        object.__setattr__(self, "precond", EDM(self.sigma_data))
        object.__setattr__(self, "sampling_precond", EDMBoundary(self.sigma_data, self.boundary_sigma))

    def schedule(self, images: int) -> dict[str, float]:
        """{"decay": q^-(stage + 1)}, the gap (t - r) / t at large t after this many images of the phase."""
        return {"decay": stage_decay(stage_of(images, self.double_images, self.max_stage), self.q)}

    def loss(self, model: Model, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image; t, noise and dropout masks from the streams "sigma", "noise" and "dropout"."""
        t_N = lognormal_sigma(Stream(seed, "sigma").normal(batch.index), self.p_mean, self.p_std)
        return self.loss_at(model, batch, t_N, noise_key(batch, seed), schedule["decay"], dropout_key(batch, seed))

    def loss_at(
        self,
        model: Model,
        batch: TrainingBatch,
        t_N: Float[Tensor, " N"],
        noise: PhiloxKey | Float[Tensor, "N C H W"],
        decay: Float[Tensor, ""] | float,
        dropout: PhiloxKey | None = None,
    ) -> LossTerms:
        """The loss of each image at given noise levels, with unit normal noise or the key to draw it.

        ``logs["boundary"]`` is the share of images with r = 0.
        """
        r_N = t_to_r(t_N, decay, self.mapping, self.k, self.b)
        weight_N = consistency_weight(t_N, r_N, self.weight, self.sigma_data)
        pair = noise_pair(batch.images, noise, t_N, r_N, self.precond, model.dtype)
        options = {"distance": self.distance, "c": self.c, "dropout": dropout}
        loss_N = pair_loss(model, model, pair, batch, weight_N, **options)
        return LossTerms(loss_N, t_N, {"boundary": pair.boundary_N.float().mean()})
