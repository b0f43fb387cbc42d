"""The continuous-time schedule of Easy Consistency Tuning, arXiv 2406.14548, and the weights of consistency losses.

Noise levels are unit-free, images have a standard deviation near sigma_data = 0.5.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

MAPPINGS = ("sigmoid", "const")

# The smallest (t - r) / t: fp32 still tells r from t, so 1 / (t - r) stays finite however late the stage.
MIN_GAP = 2.0**-20


def t_to_r(
    t_N: Float[Tensor, " N"], decay: Float[Tensor, ""] | float, mapping: str = "sigmoid", k: float = 8.0, b: float = 1.0
) -> Float[Tensor, " N"]:
    """The lower noise level r whose output the student at t must match; r = 0 means the clean image.

    r = max(0, t (1 - decay n(t))), "sigmoid": n(t) = 1 + k sigmoid(-b t), "const": n(t) = 1; arXiv 2406.14548, the
    mapping p(r | t). decay = q^-(stage + 1) may be a 0-d tensor, so that a new stage changes no graph. decay n(t) is
    at least 2^-20, a gap that fp32 resolves.
    Raises ValueError for an unknown mapping.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"unknown mapping {mapping!r}; choose one of {', '.join(MAPPINGS)}")
    n_N = 1 + k * (-b * t_N).sigmoid() if mapping == "sigmoid" else torch.ones_like(t_N)
    return (t_N * (1 - (decay * n_N).clamp(min=MIN_GAP))).clamp(min=0)


def stage_of(images: int, double_images: int, max_stage: int) -> int:
    """min(floor(images / double_images), max_stage): the stage after ``images`` training images of the phase.

    A pure function of images seen. The official training loop switches one log interval ("tick") later in a run that
    was never interrupted, and at this very image count in one resumed there.
    """
    return min(images // double_images, max_stage)


def stage_decay(stage: int, q: float) -> float:
    """decay = q^-(stage + 1) = (t - r) / t at large t; the official code's "ratio", r / t, is 1 - decay."""
    return q ** -(stage + 1)


def consistency_weight(
    t_N: Float[Tensor, " N"], r_N: Float[Tensor, " N"], weight: str = "inverse_gap", sigma_data: float = 0.5
) -> Float[Tensor, " N"]:
    """The weight of a pair of noise levels r < t.

    "uniform" 1 (arXiv 2303.01469, section 4); "inverse_gap" 1 / (t - r) (arXiv 2310.14189, section 3.1; arXiv 2406.14548);
    "edm" 1 / t^2 + 1 / sigma_data^2, EDM's lambda (arXiv 2206.00364, Table 1; arXiv 2406.14548 on ImageNet); "snr" 1 / t^2,
    "snr_plus_one" 1 / t^2 + 1, "truncated_snr" max(1 / t^2, 1) (arXiv 2202.00512, section 4).
    Raises ValueError for an unknown weight.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"unknown weight {weight!r}; choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[weight](t_N, r_N, sigma_data)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "uniform": lambda t_N, r_N, sigma_data: torch.ones_like(t_N),
    "inverse_gap": lambda t_N, r_N, sigma_data: 1 / (t_N - r_N),
    "edm": lambda t_N, r_N, sigma_data: 1 / t_N**2 + 1 / sigma_data**2,
    "snr": lambda t_N, r_N, sigma_data: 1 / t_N**2,
    "snr_plus_one": lambda t_N, r_N, sigma_data: 1 / t_N**2 + 1,
    "truncated_snr": lambda t_N, r_N, sigma_data: (1 / t_N**2).clamp(min=1),
}
