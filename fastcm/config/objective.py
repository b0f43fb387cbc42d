"""The objective section of a phase, one form for each kind."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fastcm.config.optimizer import OptimizerConfig
from fastcm.config.section import Positive, Section

Weight = Literal["uniform", "inverse_gap", "edm", "snr", "snr_plus_one", "truncated_snr"]


def _descending(levels: tuple[float, ...]) -> tuple[float, ...]:
    if any(high <= low for high, low in pairwise((80.0, *levels))):
        raise ValueError("noise levels between steps must descend from below 80")
    return levels


# Noise levels that sampling returns to between its steps.
MidSigmas = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(_descending)]
Rho = Annotated[float, Field(ge=1)]


class EDMObjectiveConfig(Section):
    """Denoising score matching: EDM, VP or VE noise distribution and weight (arXiv 2206.00364, Table 1)."""

    kind: Literal["edm"]
    variant: Literal["edm", "vp", "ve"] = "edm"
    p_mean: float = -1.2
    p_std: Annotated[float, Field(gt=0)] = 1.2
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    uncertainty: bool = False  # divide by the learned variance of each noise level (family edm2 with logvar_channels only)


class ECTObjectiveConfig(Section):
    """Easy Consistency Tuning (arXiv 2406.14548)."""

    kind: Literal["ect"]
    p_mean: float = -1.1
    p_std: Annotated[float, Field(gt=0)] = 2.0
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    q: Annotated[float, Field(gt=1)] = 2.0  # r/t = 1 - adj(t) / q^(stage+1)
    double_images: Positive = 3_200_000  # images per stage
    max_stage: Annotated[int, Field(ge=0)] = 1000
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    k: float = 8.0
    b: float = 1.0
    distance: Literal["l2", "squared", "pseudo_huber"] = "l2"
    c: Annotated[float, Field(ge=0)] = 0.0  # pseudo-Huber constant
    weight: Weight = "inverse_gap"  # "edm" is 1/t^2 + 1/sigma_data^2
    boundary_sigma: Annotated[float, Field(gt=0)] = 0.003  # sampling: D(x, boundary_sigma) = x
    mid_sigmas: MidSigmas = (0.821,)


class DiscreteObjectiveConfig(Section):
    """What CD, CT (arXiv 2303.01469) and iCT (arXiv 2310.14189) have in common: pairs of neighbours on Karras' grid."""

    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    sigma_min: Annotated[float, Field(gt=0)] = 0.002  # the network is the identity there
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    rho: Rho = 7.0
    scales: Literal["fixed", "progressive", "doubling"] = "fixed"  # how many levels the grid has
    start_scales: Positive = 2
    end_scales: Positive = 18
    scales_images: Positive = 1  # images after which a grid that becomes finer has end_scales
    indices: Literal["uniform", "lognormal"] = "uniform"
    p_mean: float = -1.1
    p_std: Annotated[float, Field(gt=0)] = 2.0
    target: Literal["student", "fixed", "adaptive"] = "student"  # adaptive: half-life grows with the number of levels
    target_halflife_images: Annotated[float, Field(ge=0)] = 0.0  # of the average that is the target; needed where there is one
    distance: Literal["l2", "squared", "pseudo_huber", "l1", "squared_32", "lpips", "features"] = "squared"
    c: Annotated[float, Field(ge=0)] = 0.0  # pseudo-Huber constant
    weight: Weight = "uniform"
    mid_sigmas: MidSigmas = ()


class CDObjectiveConfig(DiscreteObjectiveConfig):
    """Consistency distillation from a diffusion model (arXiv 2303.01469, Algorithm 2)."""

    kind: Literal["cd"]
    solver: Literal["euler", "heun"] = "heun"


class CTObjectiveConfig(DiscreteObjectiveConfig):
    """Consistency training (arXiv 2303.01469, Algorithm 3)."""

    kind: Literal["ct"]
    scales: Literal["fixed", "progressive", "doubling"] = "progressive"
    end_scales: Positive = 150
    target: Literal["student", "fixed", "adaptive"] = "adaptive"
    target_halflife_images: Annotated[float, Field(ge=0)] = 3368.35  # 0.9 a step of 512 images


class ICTObjectiveConfig(DiscreteObjectiveConfig):
    """Improved consistency training (arXiv 2310.14189, Table 1)."""

    kind: Literal["ict"]
    scales: Literal["fixed", "progressive", "doubling"] = "doubling"
    start_scales: Positive = 10
    end_scales: Positive = 1280
    indices: Literal["uniform", "lognormal"] = "lognormal"
    target: Literal["student", "fixed", "adaptive"] = "student"
    distance: Literal["l2", "squared", "pseudo_huber", "l1", "squared_32", "lpips", "features"] = "pseudo_huber"
    c: Annotated[float, Field(ge=0)] = 0.03
    weight: Weight = "inverse_gap"
    mid_sigmas: MidSigmas = (0.821,)


class PDObjectiveConfig(Section):
    """Progressive distillation (arXiv 2202.00512): every stage halves the number of steps.

    Warm-up, decay and cool-down of the learning rate and the weight averages begin anew in every stage.
    """

    kind: Literal["pd"]
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    rho: Rho = 7.0
    start_steps: Positive = 64
    end_steps: Positive = 1
    stage_images: Positive = 25_600_000
    weight: Weight = "truncated_snr"


class GANConfig(Section):
    """The adversarial stage of CTM (arXiv 2310.02279, section 3.3); the feature networks stand in the section features."""

    start_images: Annotated[int, Field(ge=0)] = 0  # of the phase; the discriminator begins there
    period: Annotated[int, Field(ge=2)] = 2  # one step in so many is the generator's
    conditional: bool = False  # show the discriminator the classes
    augment: bool = True  # differentiable augmentation of what it sees
    different_augment: bool = False  # other random numbers for generated images than for real ones
    scale_kernel: Literal[1, 3] = 1  # of the random projection's cross-scale mixing
    width: Annotated[int, Field(ge=8)] = 512  # of its heads
    norm: Literal["batch", "group"] = "batch"  # group: logits do not depend on the other images of the batch
    min_weight: Annotated[float, Field(ge=0)] = 0.01  # bounds of the adaptive weight of its loss
    max_weight: Annotated[float, Field(gt=0)] = 10.0
    optimizer: OptimizerConfig = OptimizerConfig(kind="radam", lr=2e-3, betas=(0.5, 0.9))

    @model_validator(mode="after")
    def _check_bounds(self) -> "GANConfig":
        if self.min_weight > self.max_weight:
            raise ValueError(f"min_weight {self.min_weight} is above max_weight {self.max_weight}")
        return self


class CTMObjectiveConfig(Section):
    """Consistency trajectory model (arXiv 2310.02279); ``fastcm.objectives.CTM`` explains each field."""

    kind: Literal["ctm"]
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    rho: Rho = 7.0
    num_levels: Positive = 18
    max_solver_steps: Positive = 17  # Heun steps of the teacher between t and u
    continuous: bool = False  # t and s between the levels, too
    x_u: Literal["teacher", "self"] = "teacher"  # self: no teacher, for training from scratch
    inner: Literal["edm", "edm_boundary"] = "edm"
    outer: Literal["euler", "variance", "euler_variance_mixed"] = "euler"
    target_student: bool = True  # targets jump to s by the student's own weights, not by its average's
    estimate_level: Literal["s", "u"] = "s"
    target_halflife_images: Annotated[float, Field(gt=0)] = 177_360.0  # of the average that gives targets
    distance: Literal["l2", "squared", "pseudo_huber", "l1", "squared_32", "lpips", "features"] = "lpips"
    c: Annotated[float, Field(ge=0)] = 0.0
    weight: Literal["uniform", "edm", "snr", "snr_plus_one", "truncated_snr", "uniform_g"] = "uniform"
    dsm: Literal["adaptive", "fixed", "none"] = "adaptive"  # weight of the denoising loss
    dsm_weight: Annotated[float, Field(ge=0)] = 1.0
    adaptive_layer: Literal["head", "block"] = "head"  # whose gradients give adaptive weights; block: its second convolution
    p_mean: float = -1.2
    p_std: Annotated[float, Field(gt=0)] = 1.2
    dsm_place: Annotated[float, Field(gt=0, le=1)] = 0.7
    gan: GANConfig | None = None  # the adversarial stage
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0  # of sampling: 0 jumps without noise, 1 is a consistency model's sampler
    mid_sigmas: MidSigmas = ()


ObjectiveConfig = Annotated[
    EDMObjectiveConfig
    | ECTObjectiveConfig
    | CDObjectiveConfig
    | CTObjectiveConfig
    | ICTObjectiveConfig
    | PDObjectiveConfig
    | CTMObjectiveConfig,
    Field(discriminator="kind"),
]
