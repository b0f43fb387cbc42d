"""Group normalisation in plain PyTorch: the numbers that every backend must reproduce.

Reference: Wu and He, "Group Normalization", arXiv 1803.08494, Eq. 1, 2, 6, 7.
Shapes: N samples, C channels, H x W pixels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..philox import PhiloxKey, random_dropout
from .two_pass import two_pass_norm


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
    Raises ValueError for images without a pixel.
    """
    if not x_NCHW.shape[2] * x_NCHW.shape[3]:
        raise ValueError(f"x_NCHW has shape {tuple(x_NCHW.shape)}, expected images that have a pixel")
    dtype = torch.promote_types(x_NCHW.dtype, torch.float32)
    gain, offset = weight_C.to(dtype), bias_C.to(dtype)  # [C], or [N, C] where samples differ
    if scale_NC is not None:
        factor_NC = 1 + scale_NC.to(dtype)
        gain, offset = gain * factor_NC, offset * factor_NC
    if shift_NC is not None:
        offset = offset + shift_NC.to(dtype)
    if addend_NC is not None:
        addend_NC = addend_NC.to(dtype)
    format = memory_format(x_NCHW)
    # PyTorch's NCHW kernel for the CPU is quicker than passes in PyTorch and precise; its channels_last kernel is not precise.
    suits_passes = x_NCHW.device.type == "cpu" and format == torch.channels_last
    norm = two_pass_norm if suits_passes else _native_norm
    y = norm(x_NCHW.to(dtype), num_groups, gain, offset, eps, addend_NC)
    # PyTorch's kernels return NCHW memory on CUDA up to 2.14 whatever they were given.
    y = y.contiguous(memory_format=format)
    y = F.silu(y) if silu else y
    return random_dropout(y, dropout, dropout_key).to(x_NCHW.dtype)


def _native_norm(x_NCHW: Tensor, num_groups: int, gain: Tensor, offset: Tensor, eps: float, addend_NC: Tensor | None) -> Tensor:
    """PyTorch's own kernel: what torch.compile fuses best on CUDA."""
    x_NCHW = x_NCHW if addend_NC is None else x_NCHW + addend_NC[:, :, None, None]
    if gain.ndim == offset.ndim == 1:
        return F.group_norm(x_NCHW, num_groups, gain, offset, eps)
    return F.group_norm(x_NCHW, num_groups, eps=eps) * gain[..., None, None] + offset[..., None, None]


def memory_format(x_NCHW: Float[Tensor, "N C H W"]) -> torch.memory_format:
    """NCHW for what is plainly NCHW, else channels_last (also for slices, whose strides are neither)."""
    is_nchw = x_NCHW.is_contiguous() and not x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if is_nchw else torch.channels_last
