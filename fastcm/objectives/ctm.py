"""Consistency trajectory models (CTM): one network for every jump along the ODE; arXiv 2310.02279, sections 3 and 4.

Its gradient weighs two losses against each other at the last layer, so it is not the gradient of one expression: ``CTM``
holds what is drawn and computed, ``fastcm.train.ctm_step`` puts it together.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastcm.diffusion.consistency import WEIGHTS, consistency_weight
from fastcm.diffusion.grid import Grid
from fastcm.diffusion.noise_distributions import LogNormalNoise
from fastcm.diffusion.preconditioners import EDM, EDMBoundary, Preconditioner
from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import ConfigError
from fastcm.model import Model
from fastcm.nn.network import Cut
from fastcm.objectives.base import Networks, Objective
from fastcm.objectives.consistency import ode_step
from fastcm.objectives.distances import ALL_DISTANCES, weighted_distance
from fastcm.random import Stream

INNER = {"edm": EDM, "edm_boundary": EDMBoundary}
OUTER = ("euler", "variance", "euler_variance_mixed")
X_U = ("teacher", "self")
DSM_WEIGHTS = ("adaptive", "fixed", "none")


class Jumps(NamedTuple):
    """The noise levels t >= u >= s of the jumps of each image, and the places of t and u in the grid."""

    t_N: Float[Tensor, " N"]
    u_N: Float[Tensor, " N"]
    s_N: Float[Tensor, " N"]
    t_place_N: Float[Tensor, " N"]
    u_place_N: Float[Tensor, " N"]


@dataclass(frozen=True, kw_only=True)
class CTM(Objective):
    """Soft consistency d(G_sg(G(x_t, t, s), s, sigma_min), G_sg(G_sg(x_u, u, s), s, sigma_min)) + lambda DSM.

    arXiv 2310.02279, Eq. 8 to 14. G_sg is the moving average of the student ("target"), in which the estimate's last jump is
    frozen but passes the gradient on to where it began.

    num_levels, sigma_min, sigma_max, rho: Karras' grid of t, u and s. t_i, k steps further u = t_(i+k), then s = t_j below or
    at u; i and j are uniform over what is possible. k is one number for the whole batch, p(k) ~ k for k <= max_solver_steps.
    continuous draws the places of t and s from all real ones between, k grid steps staying what they are.
    x_u: k Heun steps of the "teacher" from x_t, or, without a teacher, one jump of the moving average ("self").
    inner, outer: parametrisation of G, see ``Trajectory``. target_student: whether x_u is carried to s by the student's own
    weights, as published, or by the average's. estimate_level: whether the student jumps to "s", as published, or to "u".
    distance, c, weight: as in ``DiscreteConsistency``; weight "inverse_gap" is not defined here, "uniform_g" is
    1 / (1 - s / t). target_halflife_images: of the moving average.
    dsm: whether the denoising loss is weighed by the ratio of the two gradients of the last layer ("adaptive", Eq. 14), by
    dsm_weight ("fixed"), or left out ("none"). Its noise levels are lognormal (p_mean, p_std) for every second image, for the
    others at uniform places of the upper dsm_place of the grid. adaptive_layer: the student's layer whose gradients weigh the
    losses against each other: the last one ("head"), or the second convolution of the last "block", see ``Network.trunk``.
    Raises ConfigError for a value that cannot work.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    num_levels: int = 18
    max_solver_steps: int = 17
    continuous: bool = False
    x_u: Literal["teacher", "self"] = "teacher"
    inner: Literal["edm", "edm_boundary"] = "edm"
    outer: Literal["euler", "variance", "euler_variance_mixed"] = "euler"
    target_student: bool = True
    estimate_level: Literal["s", "u"] = "s"
    distance: str = "lpips"
    c: float = 0.0
    weight: str = "uniform"
    target_halflife_images: float = 177_360.0
    dsm: Literal["adaptive", "fixed", "none"] = "adaptive"
    dsm_weight: float = 1.0
    adaptive_layer: Cut = "head"
    p_mean: float = -1.2
    p_std: float = 1.2
    dsm_place: float = 0.7

    precond: Preconditioner = field(init=False, repr=False, compare=False)
    grid: Grid = field(init=False, repr=False, compare=False)
    dsm_noise: LogNormalNoise = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weights = {*WEIGHTS, "uniform_g"} - {"inverse_gap"}
        choices = {"x_u": X_U, "inner": INNER, "outer": OUTER, "distance": ALL_DISTANCES, "weight": weights}
        choices |= {"dsm": DSM_WEIGHTS, "estimate_level": ("s", "u"), "adaptive_layer": get_args(Cut)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(sorted(known))}, got {getattr(self, name)!r}")
        if self.num_levels < 2 or not 1 <= self.max_solver_steps < self.num_levels:
            raise ConfigError(
                f"expected num_levels of at least 2 and 1 <= max_solver_steps < num_levels, got {self.num_levels} and "
                f"{self.max_solver_steps}"
            )
        if self.target_halflife_images <= 0 or not 0 < self.dsm_place <= 1:
            raise ConfigError("expected target_halflife_images above 0 and dsm_place in (0, 1]")
        inner = EDM(self.sigma_data) if self.inner == "edm" else EDMBoundary(self.sigma_data, self.sigma_min)
        object.__setattr__(self, "precond", inner)
        object.__setattr__(self, "grid", Grid(self.sigma_min, self.sigma_max, self.rho))
        object.__setattr__(self, "dsm_noise", LogNormalNoise(self.p_mean, self.p_std, self.sigma_data))

    @property
    def needs_teacher(self) -> bool:
        """Whether x_u is found by a teacher."""
        return self.x_u == "teacher"

    @property
    def trajectory(self) -> Trajectory:
        """How jumps are made of the network."""
        return Trajectory(self.outer, self.sigma_data, self.sigma_min)

    def target_halflife(self, images: int) -> float | None:
        """Half-life of the moving average in images."""
        return self.target_halflife_images

    def num_solver_steps(self, seed: int, first_image: int) -> int:
        """k of the batch that begins with this global image, on the host: p(k) = k / sum of 1 .. max_solver_steps."""
        draw = Stream(seed, "solver_steps").uniform(torch.tensor([first_image])).item()
        steps = torch.arange(1, self.max_solver_steps + 1, dtype=torch.float64)
        return 1 + int((steps.cumsum(0) <= draw * steps.sum()).sum())

    def jumps(self, index_N: Int64[Tensor, " N"], seed: int, num_steps: int | Float[Tensor, ""]) -> Jumps:
        """The noise levels of these images for k = num_steps, from the streams "sigma" and "jump"."""
        first, second = (Stream(seed, purpose).uniform(index_N) for purpose in ("sigma", "jump"))
        last = self.num_levels - 1
        if self.continuous:
            t_place_N = first * (last - num_steps)
            s_place_N = t_place_N + num_steps + second * (last - num_steps - t_place_N)
        else:
            t_place_N = (first * (last - num_steps + 1)).floor()
            u_place_N = t_place_N + num_steps
            s_place_N = u_place_N + (second * (last - u_place_N + 1)).floor()
        return self.jumps_at(t_place_N, s_place_N, num_steps)

    def jumps_at(
        self, t_place_N: Float[Tensor, " N"], s_place_N: Float[Tensor, " N"], num_steps: int | Float[Tensor, ""]
    ) -> Jumps:
        """The noise levels at given places in the grid."""
        places = (t_place_N, t_place_N + num_steps, s_place_N)
        t_N, u_N, s_N = (self.grid.sigma(place_N, float(self.num_levels)) for place_N in places)
        return Jumps(t_N, u_N, s_N, *places[:2])

    def dsm_sigma(self, index_N: Int64[Tensor, " N"], seed: int) -> Float[Tensor, " N"]:
        """The noise levels of the denoising loss, from the stream "dsm_sigma"."""
        stream = Stream(seed, "dsm_sigma")
        return self.dsm_sigma_at(index_N, stream.normal(index_N), stream.uniform(index_N, draw=1))

    def dsm_sigma_at(
        self, index_N: Int64[Tensor, " N"], normal_N: Float[Tensor, " N"], uniform_N: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """exp(p_mean + p_std n) for images of even number, the level at place dsm_place u for the others."""
        place_N = self.dsm_place * uniform_N * (self.num_levels - 1)
        return torch.where(index_N % 2 == 0, self.dsm_noise.sigma(normal_N), self.grid.sigma(place_N, float(self.num_levels)))

    def solver_level(self, jumps: Jumps, step: int) -> Float[Tensor, " N"]:
        """The noise level after a number of solver steps from t."""
        return self.grid.sigma(jumps.t_place_N + step, float(self.num_levels))

    def solver_step(
        self, teacher: Model, x_NCHW: Float[Tensor, "N C H W"], t_N: Tensor, r_N: Tensor, labels: Tensor | None
    ) -> Float[Tensor, "N C H W"]:
        """One Heun step of the teacher from t to r; arXiv 2310.02279, section 3.2."""
        return ode_step(teacher, x_NCHW, t_N, r_N, labels, second_order=True)

    def target_image(
        self, networks: Networks, x_u_NCHW: Float[Tensor, "N C H W"], jumps: Jumps, labels: Tensor | None
    ) -> Float[Tensor, "N C H W"]:
        """What the estimate must come to: x_u carried to s, then to sigma_min, without gradient; Eq. 10."""
        carrier = networks.student if self.target_student else networks.target
        x_s_NCHW = carrier.jump(x_u_NCHW, jumps.u_N, jumps.s_N, labels)
        return networks.target.jump(x_s_NCHW, jumps.s_N, self.sigma_min, labels)

    def estimate(
        self, networks: Networks, x_s_NCHW: Float[Tensor, "N C H W"], jumps: Jumps, labels: Tensor | None
    ) -> Float[Tensor, "N C H W"]:
        """The student's images at s, carried on to sigma_min by the frozen average; Eq. 10."""
        return networks.target.jump(x_s_NCHW, self.jumped_to(jumps), self.sigma_min, labels)

    def consistency_loss(
        self,
        networks: Networks,
        estimate_NCHW: Float[Tensor, "N C H W"],
        target_NCHW: Float[Tensor, "N C H W"],
        jumps: Jumps,
        index_N: Int64[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """The weighted distance of each estimate to its target; Eq. 10."""
        images = (estimate_NCHW, target_NCHW)
        return weighted_distance(self.distance, *images, self.weight_of(jumps), self.c, networks.perceptual, index_N)

    def jumped_to(self, jumps: Jumps) -> Float[Tensor, " N"]:
        """The level that the student jumps to from t."""
        return jumps.s_N if self.estimate_level == "s" else jumps.u_N

    def weight_of(self, jumps: Jumps) -> Float[Tensor, " N"]:
        """The weight of each jump."""
        if self.weight == "uniform_g":
            return 1 / (1 - jumps.s_N / jumps.t_N)
        return consistency_weight(jumps.t_N, jumps.s_N, self.weight, self.sigma_data)

    def denoising_loss(
        self, D_NCHW: Float[Tensor, "N C H W"], clean_NCHW: Float[Tensor, "N C H W"], sigma_N: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """lambda(sigma) mean (D - y)^2 over an image, EDM's weight; Eq. 13."""
        return self.dsm_noise.weight(sigma_N) * (D_NCHW - clean_NCHW).square().flatten(1).mean(1)
