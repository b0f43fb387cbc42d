"""The consistency loss for eager forward-mode AD (torch.func.jvp): never for compiled code, where a declared jvp harms."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .registration import _loss, _loss_backward, _loss_jvp, check_arguments


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
        ctx.set_materialize_grads(False)  # a tangent that is not there is None, not zeros
        ctx.save_for_backward(output[1], *parts)
        ctx.save_for_forward(*parts)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_N is None:
            return (None,) * len(ctx.needs_input_grad)
        squares_N, *parts = ctx.saved_tensors
        found = _loss_backward(grad_N, squares_N, *parts, ctx.distance, ctx.c, [True, True, True])
        grad_F, grad_x, grad_weight_N = found
        return grad_F, grad_x, None, None, None, grad_weight_N, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        if tangents[2] is not None or tangents[3] is not None:
            raise ValueError("c_skip_t or c_out_t has a forward-mode tangent, which the consistency loss does not carry on")
        return _loss_jvp(*tangents[:2], tangents[5], *ctx.saved_tensors, ctx.distance, ctx.c)[1], None


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
    """The registered loss with forward-mode AD for F_t, x_t and weight_N, eager only; arguments are the same.

    Raises what ``consistency_loss`` raises, and ValueError for a forward-mode tangent of c_skip_t or c_out_t.
    """
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_arguments((F_t, x_t, c_skip_t, c_out_t), clean, weight_N, teacher, boundary_N, distance, c)
    detached = (None if value is None else value.detach() for value in teacher)
    inputs = (F_t, x_t, c_skip_t, c_out_t, clean.detach(), weight_N, *detached, boundary_N, distance, float(c))
    return _ConsistencyLoss.apply(*inputs)[0]
