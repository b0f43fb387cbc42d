"""Attention for eager forward-mode AD (torch.func.jvp): never for compiled code, where a declared jvp harms."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..runtime.layout import channels_last
from .registration import _attention, _attention_backward, _attention_jvp, check_arguments


class _Attention(torch.autograd.Function):
    """(out, lse) with reverse and forward mode for qkv."""

    generate_vmap_rule = False

    @staticmethod
    def forward(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        return _attention(qkv, num_heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        qkv, ctx.num_heads = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, *output)
        ctx.save_for_forward(qkv)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        return _attention_backward(dout, *ctx.saved_tensors, ctx.num_heads), None

    @staticmethod
    def jvp(ctx: Any, tqkv: Tensor, _: None) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        return _attention_jvp(qkv, channels_last(tqkv)[0], ctx.num_heads)[1], None


def attention(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> Float[Tensor, "N C H W"]:
    """The registered attention with forward-mode AD, eager only; arguments and errors are the same."""
    check_arguments(qkv_NCHW, num_heads)
    return _Attention.apply(channels_last(qkv_NCHW)[0], num_heads)[0]
