"""Group normalisation of channels_last images in plain passes over memory, for the CPU.

PyTorch's channels_last CPU kernel is as quick, but takes the variance as E[x^2] - E[x]^2, which loses all digits where the mean
is large. Here a pass gives the mean, further ones x - mean, its square, and the result.
Shapes: N samples, C channels, H x W pixels. Images are seen as [H, W, N, C], against which [N, C] broadcasts.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Normalised(NamedTuple):
    """The normalised image y = centred slope + offset, and what its gradient needs; groups' values repeated for channels.

    centred: x + addend - mean of the group; sum: of x + addend over the pixels of each channel; mean: of x + addend;
    rstd: 1 / standard deviation; slope: rstd gain.
    """

    y_HWNC: Float[Tensor, "H W N C"]
    centred_HWNC: Float[Tensor, "H W N C"]
    sum_NC: Float[Tensor, "N C"]
    mean_NC: Float[Tensor, "N C"]
    rstd_NC: Float[Tensor, "N C"]
    slope_NC: Float[Tensor, "N C"]


def two_pass_norm(
    x_NCHW: Float[Tensor, "N C H W"],
    num_groups: int,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    eps: float,
    addend_NC: Float[Tensor, "N C"] | None,
) -> Float[Tensor, "N C H W"]:
    """y = (x + addend - mean) / sqrt(var + eps) gain + offset; gain and offset are [C], or [N, C] where samples differ."""
    if torch.is_grad_enabled() and x_NCHW.requires_grad and not _differentiated_elsewhere():
        return _TwoPassNorm.apply(x_NCHW, addend_NC, gain, offset, num_groups, eps)
    return swapped(two_pass_forward(swapped(x_NCHW), addend_NC, gain, offset, num_groups, eps).y_HWNC)


def _differentiated_elsewhere() -> bool:
    """Whether a compiler, which fuses the plain passes as well, or torch.func takes their derivative."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def two_pass_forward(
    x_HWNC: Float[Tensor, "H W N C"],
    addend_NC: Float[Tensor, "N C"] | None,
    gain: Float[Tensor, "... C"],
    offset: Float[Tensor, "... C"],
    num_groups: int,
    eps: float,
) -> Normalised:
    """The norm of images that have a pixel."""
    num_pixels = x_HWNC.shape[0] * x_HWNC.shape[1]
    sum_NC = x_HWNC.sum((0, 1))
    if addend_NC is None:
        mean_NC = centre_NC = group_mean(sum_NC, num_groups, num_pixels)
    else:
        sum_NC = torch.add(sum_NC, addend_NC, alpha=num_pixels)
        mean_NC = group_mean(sum_NC, num_groups, num_pixels)
        centre_NC = mean_NC - addend_NC
    centred_HWNC = x_HWNC - centre_NC
    square_NC = (centred_HWNC * centred_HWNC).sum((0, 1))
    rstd_NC = group_mean(square_NC, num_groups, num_pixels).add_(eps).rsqrt_()
    slope_NC = rstd_NC * gain
    y_HWNC = torch.addcmul(offset, centred_HWNC, slope_NC)
    return Normalised(y_HWNC, centred_HWNC, sum_NC, mean_NC, rstd_NC, slope_NC)


class _TwoPassNorm(torch.autograd.Function):
    """The gradient in closed form from two sums per (sample, channel): B = sum_p dy, A = sum_p dy xh.

    dx = rstd (gain dy - m(gain B) / P - xh m(gain A) / P), m the mean over the channels of a group, P = H W;
    dgain = A, doffset = B, daddend = sum_p dx. With xh = centred rstd that is dx = slope dy + along centred + constant,
    of which the sum over the pixels is known without a pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, addend_NC: Tensor | None, gain: Tensor, offset: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        y_HWNC, *found = two_pass_forward(swapped(x_NCHW), addend_NC, gain, offset, num_groups, eps)
        ctx.save_for_backward(*found)
        ctx.num_groups, ctx.has_addend = num_groups, addend_NC is not None
        ctx.gain_shape, ctx.offset_shape = gain.shape, offset.shape
        return swapped(y_HWNC)

    @staticmethod
    def backward(ctx: Any, dy_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would let autograd.functional.jvp have zeros instead of this message.
            raise RuntimeError("group norm on the CPU has no second derivative; for a JVP use forward mode, under no_grad")
        centred_HWNC, sum_NC, mean_NC, rstd_NC, slope_NC = ctx.saved_tensors
        dy_HWNC, num_pixels = swapped(dy_NCHW), dy_NCHW.shape[2] * dy_NCHW.shape[3]
        B_NC = dy_HWNC.sum((0, 1))
        A_NC = (dy_HWNC * centred_HWNC).sum((0, 1)).mul_(rstd_NC)
        direct_NC = slope_NC * B_NC  # sum_p of slope dy
        along_NC = group_mean(slope_NC * A_NC, ctx.num_groups, -num_pixels).mul_(rstd_NC)
        constant_NC = group_mean(direct_NC, ctx.num_groups, -num_pixels)
        dx_HWNC = torch.addcmul(constant_NC, centred_HWNC, along_NC).addcmul_(dy_HWNC, slope_NC)
        daddend_NC = None
        if ctx.has_addend:
            rest_NC = torch.sub(sum_NC, mean_NC, alpha=num_pixels)  # sum_p of centred
            daddend_NC = direct_NC.addcmul_(along_NC, rest_NC).add_(constant_NC, alpha=num_pixels)
        dgain, doffset = A_NC.sum_to_size(ctx.gain_shape), B_NC.sum_to_size(ctx.offset_shape)
        return swapped(dx_HWNC), daddend_NC, dgain, doffset, None, None


def swapped(image: Float[Tensor, "A B C D"]) -> Float[Tensor, "C D A B"]:
    """[N, C, H, W] as [H, W, N, C], and back."""
    return image.permute(2, 3, 0, 1)


def group_mean(value_NC: Float[Tensor, "N C"], num_groups: int, divisor: int = 1) -> Float[Tensor, "N C"]:
    """The mean over the channels of each group, divided by a number and repeated for each of them: [N, C]."""
    if _suits_product(value_NC):
        average_CC = _averaging_matrix(value_NC.shape[1], num_groups, value_NC.dtype, value_NC.device)
        return torch.addmm(value_NC, value_NC, average_CC, beta=0, alpha=1 / divisor)  # one call instead of five
    grouped = value_NC.unflatten(1, (num_groups, -1))
    return (grouped.mean(2, keepdim=True) / divisor).expand_as(grouped).flatten(1)


def _suits_product(value: Tensor) -> bool:
    """Whether a product leaves nothing behind, as it would in what is traced, and no rounding, as in autocast or in TF32."""
    is_traced = torch.compiler.is_compiling() or type(value) is not Tensor
    return not is_traced and value.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@lru_cache
def _averaging_matrix(num_channels: int, num_groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, C]: 1 / (channels of a group) where two channels share a group, else 0."""
    with torch.inference_mode(False):  # kept for later calls, which may need a gradient
        group_C = torch.arange(num_channels, device=device) // (num_channels // num_groups)
        return (group_C[:, None] == group_C).to(dtype) * (num_groups / num_channels)
