"""Group normalisation in plain PyTorch: the numbers that every backend must reproduce.

Reference: Wu and He, "Group Normalization", arXiv 1803.08494, Eq. 1, 2, 6, 7.
Shapes: N samples, C channels, H x W pixels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..philox import PhiloxKey, random_bits


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
    """Normalise groups of channels, then modulate, activate and drop out.

    y = dropout(silu(norm(x + addend) (1 + scale) + shift)), norm(x) = (x - mean) / sqrt(var + eps) * weight + bias,
    mean and var over the pixels and channels of one group of one sample; arXiv 1803.08494, Eq. 1 and 2.

    Everything is computed in fp32 (fp64 for fp64 input) and rounded once at the end; the result has the dtype and
    memory format of x. Dropout needs a key and ``dropout`` > 0: element e = (h W + w) C + c of a sample is kept when
    bits(key)[n, e] >= round(dropout 2^32), and kept values are divided by 1 - dropout.
    """
    dtype = torch.promote_types(x_NCHW.dtype, torch.float32)
    y = x_NCHW.to(dtype)
    if addend_NC is not None:
        y = y + _per_channel(addend_NC, dtype)
    if y.device.type == "cpu":
        y = y - _group_mean(y.detach(), num_groups)
    y = F.group_norm(y, num_groups, weight_C.to(dtype), bias_C.to(dtype), eps)
    if scale_NC is not None:
        y = y * (1 + _per_channel(scale_NC, dtype))
    if shift_NC is not None:
        y = y + _per_channel(shift_NC, dtype)
    if silu:
        y = F.silu(y)
    if dropout_key is not None and dropout > 0:
        y = torch.where(_keep(dropout_key, y, dropout), y / (1 - dropout), 0)
    # PyTorch's CUDA kernel up to 2.14 returns NCHW memory whatever it was given.
    return y.to(x_NCHW.dtype).contiguous(memory_format=_memory_format(x_NCHW))


def _per_channel(value_NC: Tensor, dtype: torch.dtype) -> Tensor:
    return value_NC.to(dtype)[:, :, None, None]


def _group_mean(x_NCHW: Tensor, num_groups: int) -> Tensor:
    """Mean of each channel's group, [N, C, 1, 1].

    Taken out beforehand it changes neither value nor gradient, but PyTorch's channels_last CPU kernel computes the
    variance as E[x^2] - E[x]^2, which loses all digits where the mean is large.
    """
    mean_NG1 = x_NCHW.mean((2, 3)).unflatten(1, (num_groups, -1)).mean(2, keepdim=True)
    return mean_NG1.expand(-1, -1, x_NCHW.shape[1] // num_groups).flatten(1)[:, :, None, None]


def _keep(key: PhiloxKey, x_NCHW: Tensor, dropout: float) -> Bool[Tensor, "N C H W"]:
    n, channels, height, width = x_NCHW.shape
    bits = random_bits(key, height * width * channels)
    return (bits >= round(dropout * 2**32)).reshape(n, height, width, channels).permute(0, 3, 1, 2)


def _memory_format(x_NCHW: Tensor) -> torch.memory_format:
    """NCHW for what is plainly NCHW, else channels_last (also for slices, whose strides are neither)."""
    is_nchw = x_NCHW.is_contiguous() and not x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if is_nchw else torch.channels_last
