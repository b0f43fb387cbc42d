"""Group normalisation of channels_last images in few passes over memory, for the CPU.

PyTorch's channels_last CPU kernel takes the variance as E[x^2] - E[x]^2, which loses all digits where the mean is large,
and costs three times as much as the plain passes below.
Shapes: N samples, P pixels, C channels.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def two_pass_norm(
    x_NCHW: Float[Tensor, "N C H W"],
    num_groups: int,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    eps: float,
    addend_NC: Float[Tensor, "N C"] | None,
) -> Float[Tensor, "N C H W"]:
    """y = (x + addend - mean) / sqrt(var + eps) * gain + offset; gain and offset are [C], or [N, C] where samples differ."""
    # A compiler differentiates and fuses the plain passes itself.
    if torch.is_grad_enabled() and x_NCHW.requires_grad and not torch.compiler.is_compiling():
        return _TwoPassNorm.apply(x_NCHW, addend_NC, gain, offset, num_groups, eps)
    return _image(two_pass_forward(_pixels(x_NCHW), addend_NC, gain, offset, num_groups, eps)[0], x_NCHW)


def two_pass_forward(
    x_NPC: Float[Tensor, "N P C"],
    addend_NC: Float[Tensor, "N C"] | None,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    num_groups: int,
    eps: float,
) -> tuple[Float[Tensor, "N P C"], Float[Tensor, "N C"], Float[Tensor, "N P C"], Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """y and what the gradient needs: the rounded mean, x + addend without it, the rest of the mean, 1 / standard deviation."""
    mean_NC = x_NPC.mean(1)
    mean_NC = group_mean(mean_NC if addend_NC is None else mean_NC + addend_NC, num_groups)
    centred_NPC = x_NPC - (mean_NC if addend_NC is None else mean_NC - addend_NC)[:, None]
    # A second look at the mean removes the rounding of the first; it costs no further pass that writes.
    rest_NC = group_mean(centred_NPC.mean(1), num_groups)
    variance_NC = group_mean((centred_NPC * centred_NPC).mean(1), num_groups) - rest_NC * rest_NC
    rstd_NC = (variance_NC + eps).rsqrt()
    slope_NC = rstd_NC * gain
    y_NPC = torch.addcmul((offset - rest_NC * slope_NC)[:, None], centred_NPC, slope_NC[:, None])
    return y_NPC, mean_NC, centred_NPC, rest_NC, rstd_NC


class _TwoPassNorm(torch.autograd.Function):
    """The gradient in closed form from two sums per (sample, channel): B = sum_p dy, A = sum_p dy xh.

    dx = rstd (gain dy - m(gain B) / P - xh m(gain A) / P), m the mean over the channels of a group;
    dgain = A, doffset = B, daddend = sum_p dx. xh is off by the rounding of the mean, as in PyTorch's own kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, addend_NC: Tensor | None, gain: Tensor, offset: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        y_NPC, _, centred_NPC, _, rstd_NC = two_pass_forward(_pixels(x_NCHW), addend_NC, gain, offset, num_groups, eps)
        ctx.save_for_backward(gain, centred_NPC, rstd_NC)
        ctx.num_groups, ctx.has_addend, ctx.offset_shape = num_groups, addend_NC is not None, offset.shape
        return _image(y_NPC, x_NCHW)

    @staticmethod
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would let autograd.functional.jvp have zeros instead of this message.
            raise RuntimeError("group norm on the CPU has no second derivative; for a JVP use forward mode, under no_grad")
        gain, centred_NPC, rstd_NC = ctx.saved_tensors
        dy_NPC = _pixels(dy_NCHW)
        B_NC = dy_NPC.sum(1)
        A_NC = (dy_NPC * centred_NPC).sum(1) * rstd_NC
        share_NC = rstd_NC / -centred_NPC.shape[1]
        along_NC = share_NC * rstd_NC * group_mean(gain * A_NC, ctx.num_groups)
        constant_NC = share_NC * group_mean(gain * B_NC, ctx.num_groups)
        dx_NPC = torch.addcmul(constant_NC[:, None], centred_NPC, along_NC[:, None])
        dx_NPC.addcmul_(dy_NPC, (rstd_NC * gain)[:, None])
        daddend_NC = dx_NPC.sum(1) if ctx.has_addend else None
        dgain, doffset = A_NC.sum_to_size(gain.shape), B_NC.sum_to_size(ctx.offset_shape)
        return _image(dx_NPC, dy_NCHW), daddend_NC, dgain, doffset, None, None


def _pixels(x_NCHW: Tensor) -> Tensor:
    """[N, P, C], without a copy where the image is channels_last."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _image(value_NPC: Tensor, like_NCHW: Tensor) -> Tensor:
    """[N, C, H, W] of a shape, channels_last."""
    return value_NPC.unflatten(1, like_NCHW.shape[2:]).permute(0, 3, 1, 2)


def group_mean(value_NC: Float[Tensor, "N C"], num_groups: int) -> Float[Tensor, "N C"]:
    """The mean over the channels of each group, repeated for each of them: [N, C]."""
    num_channels = value_NC.shape[1]
    if torch.compiler.is_compiling():
        grouped = value_NC.unflatten(1, (num_groups, -1))
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)
    return value_NC @ _averaging_matrix(num_channels, num_groups, value_NC.dtype)  # one call instead of four


@lru_cache
def _averaging_matrix(num_channels: int, num_groups: int, dtype: torch.dtype) -> Tensor:
    """[C, C]: 1 / (channels of a group) where two channels share a group, else 0."""
    with torch.inference_mode(False):  # kept for later calls, which may need a gradient
        group_C = torch.arange(num_channels) // (num_channels // num_groups)
        return (group_C[:, None] == group_C).to(dtype) * (num_groups / num_channels)
