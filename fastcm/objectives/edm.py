"""Denoising score matching with the noise distributions, weights and preconditioners of EDM, VP and VE."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fastcm import ops
from fastcm.diffusion.noise_distributions import LogNormalNoise, NoiseDistribution, VENoise, VPNoise
from fastcm.diffusion.preconditioners import EDM, VE, VP, Preconditioner
from fastcm.errors import ConfigError
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import Model
from fastcm.objectives.base import LossTerms, Networks, Objective, TrainingBatch, dropout_key, noise_key
from fastcm.random import Stream

VARIANTS = ("edm", "vp", "ve")


@dataclass(frozen=True, kw_only=True)
class EDMObjective(Objective):
    """Diffusion training: loss = lambda(sigma) ||D(y + sigma n; sigma) - y||^2; arXiv 2206.00364, Eq. 2 and Table 1.

    With ``uncertainty``: lambda(sigma) / e^u ||D - y||^2 + u d, u = u(sigma) the network's learned log variance, d the number
    of elements of an image; arXiv 2312.02696, Eq. 21. At its minimum e^u is the mean weighted error of an element at sigma,
    so all noise levels weigh the same. ValueError in ``loss`` for a network that has no log variance.

    variant: "edm", "vp" or "ve" chooses noise distribution, lambda and preconditioner together. p_mean, p_std,
    sigma_data: constants of "edm". beta_d, beta_min, epsilon_t: of "vp". sigma_min, sigma_max: of "ve".
    Raises ConfigError for an unknown variant.
    """

    variant: Literal["edm", "vp", "ve"] = "edm"
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    sigma_min: float = 0.02
    sigma_max: float = 100.0
    uncertainty: bool = False

    # How noise levels are drawn and weighted, and the preconditioner to train with.
    noise: NoiseDistribution = field(init=False, repr=False, compare=False)
    precond: Preconditioner = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant: expected one of {', '.join(VARIANTS)}, got {self.variant!r}")
        noise, precond = {
            "edm": (LogNormalNoise(self.p_mean, self.p_std, self.sigma_data), EDM(self.sigma_data)),
            "vp": (
                VPNoise(self.beta_d, self.beta_min, self.epsilon_t),
                VP(self.beta_d, self.beta_min, epsilon_t=self.epsilon_t),
            ),
            "ve": (VENoise(self.sigma_min, self.sigma_max), VE(self.sigma_min, self.sigma_max)),
        }[self.variant]
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "precond", precond)

    def loss(self, networks: Networks, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image, noise level and noise drawn from the streams "sigma" and "noise"."""
        noise, stream = self.noise, Stream(seed, "sigma")
        draw_N = stream.normal(batch.index) if noise.draw == "normal" else stream.uniform(batch.index)
        return self.loss_at(networks.student, batch, noise.sigma(draw_N), noise_key(batch, seed), dropout_key(batch, seed))

    def loss_at(
        self,
        model: Model,
        batch: TrainingBatch,
        sigma_N: Float[Tensor, " N"],
        noise: PhiloxKey | Float[Tensor, "N C H W"],
        dropout: PhiloxKey | None = None,
    ) -> LossTerms:
        """The loss of each image at given noise levels, with unit normal noise or the key to draw it."""
        scalings = self.precond.scalings(sigma_N)
        noised = ops.add_noise(batch.images, noise, sigma_N, scalings.c_in, dtype=model.dtype)
        F_NCHW = model.from_input(noised.input_t, scalings.c_noise, batch.labels, batch.augment, dropout)
        weight_N, penalty_N = self.noise.weight(sigma_N), 0.0
        if self.uncertainty:
            u_N = model.net.log_variance(scalings.c_noise)
            weight_N, penalty_N = weight_N * (-u_N).exp(), u_N * batch.images[0].numel()
        loss_N = ops.consistency_loss(
            F_NCHW, noised.x_t, scalings.c_skip, scalings.c_out, batch.images, weight_N, distance="squared"
        )
        return LossTerms(loss_N + penalty_N, sigma_N, {})


def weighted_error(
    D_NCHW: Float[Tensor, "N C H W"], clean_NCHW: Float[Tensor, "N C H W"], weight_N: Float[Tensor, " N"]
) -> Float[Tensor, "N C H W"]:
    """The squared error of each element, weighted: lambda (D - y)^2, whose sum over an image is its loss.

    arXiv 2206.00364, Eq. 2.
    """
    return weight_N[:, None, None, None] * (D_NCHW - clean_NCHW) ** 2
