"""Group normalisation of channels_last images in few passes over memory, for the CPU.

PyTorch's channels_last CPU kernel takes the variance as E[x^2] - E[x]^2, which loses all digits where the mean is large,
and costs three times as much as the passes below: one for the mean, one for E[(x - mean)^2], one for the result.
Shapes: N samples, C channels, H x W pixels. Images are seen as [H, W, N, C], against which [N, C] broadcasts.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NO_REDUCTION = 0  # of losses, in the enumeration of aten


class Statistics(NamedTuple):
    """What the norm of an image, y = slope x + constant, is computed with; values of groups are repeated for their channels.

    sum: of x over the pixels of each channel; centre: the mean of the group without the addend of the channel;
    rstd: 1 / standard deviation; slope: rstd gain; constant: offset - centre slope.
    """

    sum_NC: Float[Tensor, "N C"]
    centre_NC: Float[Tensor, "N C"]
    rstd_NC: Float[Tensor, "N C"]
    slope_NC: Float[Tensor, "N C"]
    constant_NC: Float[Tensor, "N C"]


def two_pass_norm(
    x_NCHW: Float[Tensor, "N C H W"],
    num_groups: int,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    eps: float,
    addend_NC: Float[Tensor, "N C"] | None,
) -> Float[Tensor, "N C H W"]:
    """y = (x + addend - mean) / sqrt(var + eps) gain + offset; gain and offset are [C], or [N, C] where samples differ."""
    # A compiler differentiates and fuses the plain passes itself.
    if torch.is_grad_enabled() and x_NCHW.requires_grad and not torch.compiler.is_compiling():
        return _TwoPassNorm.apply(x_NCHW, addend_NC, gain, offset, num_groups, eps)
    x_HWNC = swapped(x_NCHW)
    return swapped(normalised(x_HWNC, statistics(x_HWNC, addend_NC, gain, offset, num_groups, eps)))


def statistics(
    x_HWNC: Float[Tensor, "H W N C"],
    addend_NC: Float[Tensor, "N C"] | None,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    num_groups: int,
    eps: float,
) -> Statistics:
    """Two passes over images that have a pixel."""
    num_pixels = x_HWNC.shape[0] * x_HWNC.shape[1]
    sum_NC = x_HWNC.sum((0, 1))
    if addend_NC is None:
        centre_NC = group_mean(sum_NC, num_groups, num_pixels)
    else:
        centre_NC = group_mean(torch.add(sum_NC, addend_NC, alpha=num_pixels), num_groups, num_pixels) - addend_NC
    # (x - centre)^2 in one pass; F.mse_loss, which calls this, costs as much again in checks.
    square_HWNC = torch.ops.aten.mse_loss(x_HWNC, centre_NC.expand_as(x_HWNC), NO_REDUCTION)
    rstd_NC = group_mean(square_HWNC.sum((0, 1)), num_groups, num_pixels).add_(eps).rsqrt_()
    slope_NC = rstd_NC * gain
    return Statistics(sum_NC, centre_NC, rstd_NC, slope_NC, torch.addcmul(offset, centre_NC, slope_NC, value=-1))


def normalised(x_HWNC: Float[Tensor, "H W N C"], found: Statistics) -> Float[Tensor, "H W N C"]:
    """The third pass."""
    return torch.addcmul(found.constant_NC, x_HWNC, found.slope_NC)


class _TwoPassNorm(torch.autograd.Function):
    """The gradient in closed form from two sums per (sample, channel): B = sum_p dy, A = sum_p dy xh.

    dx = rstd (gain dy - m(gain B) / P - xh m(gain A) / P), m the mean over the channels of a group, P = H W;
    dgain = A, doffset = B, daddend = sum_p dx. With xh = (x - centre) rstd that is dx = slope dy + along x + constant,
    of which the sum over the pixels is known without a pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, addend_NC: Tensor | None, gain: Tensor, offset: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        x_HWNC = swapped(x_NCHW)
        found = statistics(x_HWNC, addend_NC, gain, offset, num_groups, eps)
        ctx.save_for_backward(x_HWNC, *found)
        ctx.num_groups, ctx.has_addend = num_groups, addend_NC is not None
        ctx.gain_shape, ctx.offset_shape = gain.shape, offset.shape
        return swapped(normalised(x_HWNC, found))

    @staticmethod
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would let autograd.functional.jvp have zeros instead of this message.
            raise RuntimeError("group norm on the CPU has no second derivative; for a JVP use forward mode, under no_grad")
        x_HWNC, *found = ctx.saved_tensors
        found, dy_HWNC = Statistics(*found), swapped(dy_NCHW)
        num_pixels, centre_NC = dy_NCHW.shape[2] * dy_NCHW.shape[3], found.centre_NC
        B_NC = dy_HWNC.sum((0, 1))
        A_NC = torch.addcmul((dy_HWNC * x_HWNC).sum((0, 1)), centre_NC, B_NC, value=-1).mul_(found.rstd_NC)
        direct_NC = found.slope_NC * B_NC  # sum_p of slope dy
        along_NC = group_mean(found.slope_NC * A_NC, ctx.num_groups, -num_pixels).mul_(found.rstd_NC)
        constant_NC = group_mean(direct_NC, ctx.num_groups, -num_pixels).addcmul_(centre_NC, along_NC, value=-1)
        dx_HWNC = torch.addcmul(constant_NC, x_HWNC, along_NC).addcmul_(dy_HWNC, found.slope_NC)
        daddend_NC = direct_NC.addcmul_(along_NC, found.sum_NC).add_(constant_NC, alpha=num_pixels) if ctx.has_addend else None
        dgain, doffset = A_NC.sum_to_size(ctx.gain_shape), B_NC.sum_to_size(ctx.offset_shape)
        return swapped(dx_HWNC), daddend_NC, dgain, doffset, None, None


def swapped(image: Float[Tensor, "A B C D"]) -> Float[Tensor, "C D A B"]:
    """[N, C, H, W] as [H, W, N, C], and back."""
    return image.permute(2, 3, 0, 1)


def group_mean(value_NC: Float[Tensor, "N C"], num_groups: int, divisor: int = 1) -> Float[Tensor, "N C"]:
    """The mean over the channels of each group, divided by a number and repeated for each of them: [N, C]."""
    if torch.compiler.is_compiling() or type(value_NC) is not Tensor:  # what is traced leaves nothing behind
        grouped = value_NC.unflatten(1, (num_groups, -1))
        return (grouped.mean(2, keepdim=True) / divisor).expand_as(grouped).flatten(1)
    average_CC = _averaging_matrix(value_NC.shape[1], num_groups, value_NC.dtype, value_NC.device)
    return torch.addmm(value_NC, value_NC, average_CC, beta=0, alpha=1 / divisor)  # one call instead of five


@lru_cache
def _averaging_matrix(num_channels: int, num_groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, C]: 1 / (channels of a group) where two channels share a group, else 0."""
    with torch.inference_mode(False):  # kept for later calls, which may need a gradient
        group_C = torch.arange(num_channels, device=device) // (num_channels // num_groups)
        return (group_C[:, None] == group_C).to(dtype) * (num_groups / num_channels)
