"""Group norm for eager forward-mode AD (torch.func.jvp): never for compiled code, where a declared jvp harms."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..philox import PhiloxKey
from .reference import memory_format
from .registration import _norm, _norm_jvp, all_gradients, checked_call, join_tensors, split_tensors


class _GroupNorm(torch.autograd.Function):
    """(y, mean, rstd) with reverse mode for all arguments, and forward mode for x, addend, scale and shift."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _norm(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tensors, ctx.plain = split_tensors(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # a tangent that is not there is None, not zeros
        ctx.save_for_backward(*output[1:], *tensors)
        ctx.save_for_forward(*output[1:], *tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, rstd, *tensors = ctx.saved_tensors
        return all_gradients(dy, mean, rstd, join_tensors(tensors, ctx.plain), ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        if tangents[2] is not None or tangents[3] is not None:
            raise ValueError("weight_C or bias_C has a forward-mode tangent, which group norm does not carry on")
        call = join_tensors(list(ctx.saved_tensors[2:]), ctx.plain)
        tx = torch.zeros_like(call.x_NCHW) if tangents[0] is None else tangents[0]
        return _norm_jvp(tx, *tangents[5:8], *call)[1], None, None


def group_norm(
    x_NCHW: Float[Tensor, "N C H W"],
    num_groups: int,
    weight_C: Float[Tensor, " C"],
    bias_C: Float[Tensor, " C"],
    eps: float,
    *,
    addend_NC: Float[Tensor, "N C"] | None = None,
    scale_NC: Float[Tensor, "N C"] | None = None,
    shift_NC: Float[Tensor, "N C"] | None = None,
    silu: bool = False,
    dropout: float = 0.0,
    dropout_key: PhiloxKey | None = None,
) -> Float[Tensor, "N C H W"]:
    """The registered group norm with forward-mode AD for x, addend, scale and shift, eager only; arguments are the same.

    Raises what ``group_norm`` raises, and ValueError for a forward-mode tangent of weight or bias.
    """
    call = checked_call(x_NCHW, num_groups, weight_C, bias_C, eps, addend_NC, scale_NC, shift_NC, silu, dropout, dropout_key)
    return _GroupNorm.apply(*call)[0].contiguous(memory_format=memory_format(x_NCHW))
