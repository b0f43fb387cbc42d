"""Easy Consistency Tuning (ECT): a diffusion model becomes its own consistency model; arXiv 2406.14548."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fastcm.diffusion.consistency import MAPPINGS, WEIGHTS, consistency_weight, stage_decay, stage_of, t_to_r
from fastcm.diffusion.noise_distributions import lognormal_sigma
from fastcm.diffusion.preconditioners import EDM, EDMBoundary, Preconditioner
from fastcm.errors import ConfigError
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import Model
from fastcm.objectives.base import LossTerms, Networks, Objective, TrainingBatch, dropout_key, noise_key
from fastcm.objectives.consistency import noise_pair, pair_loss
from fastcm.ops import DISTANCES
from fastcm.random import Stream


@dataclass(frozen=True, kw_only=True)
class ECT(Objective):
    """Easy Consistency Tuning: the network itself, without gradient, is the target at r(t); arXiv 2406.14548.

    ln t ~ N(p_mean, p_std^2), not clipped; r = t (1 - n(t) / q^(stage + 1)) or 0, n(t) = 1 + k sigmoid(-b t) for mapping
    "sigmoid", 1 for "const"; stage = images seen // double_images, at most max_stage. distance "l2" is the norm over an
    image's pixels, "squared" its square, "pseudo_huber" sqrt(norm^2 + c^2) - c; weight is one of
    ``WEIGHTS``. Training uses EDM's scalings; sampling those with D(x; boundary_sigma) = x.
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
    weight: str = "inverse_gap"
    boundary_sigma: float = 0.003
    precond: Preconditioner = field(init=False, repr=False, compare=False)

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

    @property
    def sampling_precond(self) -> Preconditioner:
        """EDM's scalings moved so that D(x; boundary_sigma) = x."""
        return EDMBoundary(self.sigma_data, self.boundary_sigma)

    def schedule(self, images: int) -> dict[str, float]:
        """{"decay": q^-(stage + 1)}, the gap (t - r) / t at large t after this many images of the phase."""
        return {"decay": stage_decay(stage_of(images, self.double_images, self.max_stage), self.q)}

    def loss(self, networks: Networks, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image; t, noise and dropout masks from the streams "sigma", "noise" and "dropout"."""
        t_N = lognormal_sigma(Stream(seed, "sigma").normal(batch.index), self.p_mean, self.p_std)
        noise, dropout = noise_key(batch, seed), dropout_key(batch, seed)
        return self.loss_at(networks.student, batch, t_N, noise, schedule["decay"], dropout)

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
