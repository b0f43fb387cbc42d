"""Consistency loss in plain PyTorch: preconditioning of student and target, distance and weight in one function.

Shapes: N samples, C channels, H by W pixels. Arithmetic is fp32, or fp64 where an input is fp64.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

DISTANCES = ("l2", "squared", "pseudo_huber")


def consistency_loss(
    F_t: Float[Tensor, "N C H W"],
    x_t: Float[Tensor, "N C H W"],
    c_skip_t: Float[Tensor, " N"],
    c_out_t: Float[Tensor, " N"],
    clean: Float[Tensor, "N C H W"],
    weight_N: Float[Tensor, " N"],
    *,
    F_r: Float[Tensor, "N C H W"] | None = None,
    x_r: Float[Tensor, "N C H W"] | None = None,
    c_skip_r: Float[Tensor, " N"] | None = None,
    c_out_r: Float[Tensor, " N"] | None = None,
    boundary_N: Bool[Tensor, " N"] | None = None,
    distance: str = "l2",
    c: float = 0.0,
) -> Float[Tensor, " N"]:
    """Weighted distance of the student's denoised image to its target, one number per sample.

    loss = weight d(D_t - target), D_t = c_skip_t x_t + c_out_t F_t; the target carries no gradient: it is ``clean``
    where ``boundary_N`` or where there is no teacher, else D_r = c_skip_r x_r + c_out_r F_r.
    d(v) with S = sum of v^2 over all pixels: "squared" S (arXiv 2206.00364, Eq. 2), "l2" sqrt(S) (arXiv 2406.14548),
    "pseudo_huber" sqrt(S + c^2) - c (arXiv 2310.14189, section 3.3).

    The gradient of a distance at S = 0 is 0, its value 0. Rows of ``F_r`` and ``x_r`` under the boundary are never
    read, and nothing else is masked: a NaN anywhere else stays a NaN in the loss of its own sample.

    Arguments: images [N, C, H, W]; scalings and ``weight_N`` [N]; ``boundary_N`` bool [N].
    Raises ValueError for an unknown distance, a negative c or a teacher that is given only in part.
    """
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_options(teacher, distance, c)
    difference_NCHW = difference((F_t, x_t, c_skip_t, c_out_t), clean, teacher, boundary_N)
    return weight_N * distance_of(sum_of_squares(difference_NCHW), distance, c)


def check_options(teacher: tuple[Shaped[Tensor, "..."] | None, ...], distance: str, c: float) -> None:
    """Raise ValueError for an unknown distance, a negative c or a teacher (F_r, x_r, c_skip_r, c_out_r) given in part."""
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; choose one of {', '.join(DISTANCES)}")
    if c < 0:
        raise ValueError(f"the pseudo-Huber constant c must not be negative, got {c}")
    if len({part is None for part in teacher}) > 1:
        raise ValueError("a teacher needs all of F_r, x_r, c_skip_r and c_out_r")


def difference(
    student: tuple[Shaped[Tensor, "..."], ...],
    clean: Float[Tensor, "N C H W"],
    teacher: tuple[Shaped[Tensor, "..."] | None, ...],
    boundary_N: Bool[Tensor, " N"] | None,
) -> Float[Tensor, "N C H W"]:
    """D_t minus its target, which carries no gradient; student and teacher are (F, x, c_skip, c_out)."""
    D_t = _denoised(*student)
    target = clean.to(D_t.dtype) if teacher[0] is None else _target(_denoised(*teacher), clean, boundary_N)
    return D_t - target.detach()


def sum_of_squares(x_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """S per sample."""
    return x_NCHW.square().flatten(1).sum(1)


def _denoised(F: Tensor, x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """D = c_skip x + c_out F; arXiv 2206.00364, Eq. 7."""
    dtype = torch.promote_types(torch.promote_types(F.dtype, x.dtype), torch.float32)
    return _per_image(c_skip) * x.to(dtype) + _per_image(c_out) * F.to(dtype)


def _per_image(value_N: Tensor) -> Tensor:
    return value_N.reshape(-1, 1, 1, 1)


def _target(D_r: Tensor, clean: Tensor, boundary_N: Tensor | None) -> Tensor:
    return D_r if boundary_N is None else torch.where(_per_image(boundary_N), clean.to(D_r.dtype), D_r)


def distance_of(squares_N: Float[Tensor, " N"], distance: str, c: float) -> Float[Tensor, " N"]:
    """d from S: S, sqrt(S) or sqrt(S + c^2) - c, with derivative 0 where the root is 0."""
    if distance == "squared":
        return squares_N
    c = c if distance == "pseudo_huber" else 0.0
    radicand_N = squares_N + c * c
    # sqrt has no derivative at 0: such rows take the root of 1 instead and leave the result through the other branch.
    # "radicand > 0" would send a NaN there too, so the test is for equality.
    is_zero_N = radicand_N == 0
    root_N = torch.where(is_zero_N, torch.ones_like(radicand_N), radicand_N).sqrt()
    # sqrt(S + c^2) - c without the cancellation at small S.
    return torch.where(is_zero_N, torch.zeros_like(root_N), squares_N / (root_N + c))
