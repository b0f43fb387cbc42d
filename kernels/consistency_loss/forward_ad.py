"""The consistency loss for eager forward-mode AD (torch.func.jvp): never for compiled code, where a declared jvp harms."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import derivatives
from .derivatives import Denoiser, Gradients, Target
from .registration import _loss, _loss_backward, check_arguments


class _ConsistencyLoss(torch.autograd.Function):
    """(loss, S) with reverse and forward mode for F_t, x_t and the weight."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _loss(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *parts, ctx.distance, ctx.c = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *parts)
        ctx.save_for_forward(output[1], *parts)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        squares_N, *parts = ctx.saved_tensors
        found = _loss_backward(grad_N, squares_N, *parts, ctx.distance, ctx.c, [True, True, True])
        grad_F, grad_x, grad_weight_N = found
        return grad_F, grad_x, None, None, None, grad_weight_N, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        squares_N, F_t, x_t, c_skip_t, c_out_t, clean, weight_N, *teacher, boundary_N = ctx.saved_tensors
        student, target = Denoiser(F_t, x_t, c_skip_t, c_out_t), _target(clean, teacher, boundary_N)
        given = Gradients(tangents[0], tangents[1], tangents[5])
        return derivatives.jvp(given, squares_N, student, target, weight_N, ctx.distance, ctx.c), None


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
    """The registered loss with forward-mode AD for F_t, x_t and weight_N, eager only; arguments and errors are the same."""
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_arguments((F_t, x_t, c_skip_t, c_out_t), clean, weight_N, teacher, boundary_N, distance, c)
    detached = (None if value is None else value.detach() for value in teacher)
    inputs = (F_t, x_t, c_skip_t, c_out_t, clean.detach(), weight_N, *detached, boundary_N, distance, float(c))
    return _ConsistencyLoss.apply(*inputs)[0]


def consistency_loss_jvp(
    tangents: Gradients,
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
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The loss and its tangent, dual propagation without AD: dL = w h <D_t - target, c_out dF + c_skip dx> + dw d(S).

    h(S) = 2 d'(S). ``tangents`` holds those of F_t, x_t and weight_N, None for 0; the other arguments and the errors are
    those of ``consistency_loss``. The target and the scalings have no tangent. The tangent is plain PyTorch.
    """
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_arguments((F_t, x_t, c_skip_t, c_out_t), clean, weight_N, teacher, boundary_N, distance, c)
    loss_N, squares_N = _loss(F_t, x_t, c_skip_t, c_out_t, clean, weight_N, *teacher, boundary_N, distance, float(c))
    student, target = Denoiser(F_t, x_t, c_skip_t, c_out_t), _target(clean, teacher, boundary_N)
    return loss_N, derivatives.jvp(tangents, squares_N, student, target, weight_N, distance, c)


def _target(clean: Tensor, teacher: tuple[Tensor | None, ...], boundary_N: Tensor | None) -> Target:
    return Target(clean, None if teacher[0] is None else Denoiser(*teacher), boundary_N)
