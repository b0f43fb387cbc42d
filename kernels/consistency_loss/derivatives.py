"""Consistency loss and its derivatives in closed form, plain PyTorch: what runs where the kernels do not.

With v = D_t - target, S = sum v^2 per sample and the slope h(S) = 2 d'(S), dL = w h <v, dD_t> + dw d(S). fp32, or fp64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import reference


class Denoiser(NamedTuple):
    """What makes D = c_skip x + c_out F: raw network output and input images [N, C, H, W], scalings [N]."""

    F: Float[Tensor, "N C H W"]
    x: Float[Tensor, "N C H W"]
    c_skip: Float[Tensor, " N"]
    c_out: Float[Tensor, " N"]


class Target(NamedTuple):
    """The clean images, the teacher (None: the target is clean) and the rows whose target is clean in any case."""

    clean: Float[Tensor, "N C H W"]
    teacher: Denoiser | None = None
    boundary_N: Bool[Tensor, " N"] | None = None


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to; None where not asked for."""

    F_t: Float[Tensor, "N C H W"] | None
    x_t: Float[Tensor, "N C H W"] | None
    weight_N: Float[Tensor, " N"] | None


class Tangents(NamedTuple):
    """Tangents of F_t, x_t and the weight; None for 0."""

    F_t: Float[Tensor, "N C H W"] | None
    x_t: Float[Tensor, "N C H W"] | None
    weight_N: Float[Tensor, " N"] | None


def difference(student: Denoiser, target: Target) -> Float[Tensor, "N C H W"]:
    """v = D_t - target."""
    return reference.difference(student, target.clean, target.teacher or (None,) * 4, target.boundary_N)


def forward(
    student: Denoiser, target: Target, weight_N: Float[Tensor, " N"], distance: str, c: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(loss, S) per sample, as the reference computes them."""
    squares_N = reference.sum_of_squares(difference(student, target))
    return weight_N * reference.distance_of(squares_N, distance, c), squares_N


def slope(squares_N: Float[Tensor, " N"], distance: str, c: float) -> Float[Tensor, " N"]:
    """h(S) = 2 d'(S): 2, or 1 / sqrt(S + c^2); where that root is 0, v is 0, and a finite h makes a gradient of 0."""
    if distance == "squared":
        return torch.full_like(squares_N, 2)
    c = c if distance == "pseudo_huber" else 0.0
    radicand_N = squares_N + c * c
    root_N = torch.where(radicand_N == 0, 1, radicand_N).sqrt()
    # 0 S: where S has overflowed the loss is NaN, and 1 / root alone would make a gradient of 0 of it.
    return 1 / root_N + 0 * squares_N


def backward(
    grad_N: Float[Tensor, " N"],
    squares_N: Float[Tensor, " N"],
    student: Denoiser,
    target: Target,
    weight_N: Float[Tensor, " N"],
    distance: str,
    c: float,
    needed: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """Gradients of F_t, x_t and the weight, those that are needed.

    dF = g w h c_out v, dx = g w h c_skip v, dw = g d(S); g the gradient of the loss, S what ``forward`` found.
    """
    grad_F = grad_x = grad_weight_N = None
    if needed[0] or needed[1]:
        difference_NCHW = difference(student, target)
        factor_N = grad_N * weight_N * slope(squares_N, distance, c)
        if needed[0]:
            grad_F = (_per_image(factor_N * student.c_out) * difference_NCHW).to(student.F.dtype)
        if needed[1]:
            grad_x = (_per_image(factor_N * student.c_skip) * difference_NCHW).to(student.x.dtype)
    if needed[2]:
        grad_weight_N = (grad_N * reference.distance_of(squares_N, distance, c)).to(weight_N.dtype)
    return Gradients(grad_F, grad_x, grad_weight_N)


def jvp(
    tangents: Tangents, student: Denoiser, target: Target, weight_N: Float[Tensor, " N"], distance: str, c: float
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(loss, its tangent) per sample: w h <v, c_out tF + c_skip tx> + tw d(S)."""
    difference_NCHW = difference(student, target)
    squares_N = reference.sum_of_squares(difference_NCHW)
    distance_N = reference.distance_of(squares_N, distance, c)
    product_N = torch.zeros_like(squares_N)
    for scaling_N, tangent_NCHW in ((student.c_out, tangents.F_t), (student.c_skip, tangents.x_t)):
        if tangent_NCHW is not None:
            product_N = product_N + scaling_N * (difference_NCHW * tangent_NCHW).flatten(1).sum(1)
    tangent_N = weight_N * slope(squares_N, distance, c) * product_N
    if tangents.weight_N is not None:
        tangent_N = tangent_N + tangents.weight_N * distance_N
    return weight_N * distance_N, tangent_N


def _per_image(value_N: Tensor) -> Tensor:
    return value_N.reshape(-1, 1, 1, 1)
