"""Attention by xformers, where it is installed: ``xformers.ops.memory_efficient_attention`` on views of qkv."""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# What its kernels need of D; zeros beside q and k change no score, and those beside v are cut off again.
DIVISOR = 8


@lru_cache
def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers cannot run for images of this dtype on this device, in words; None where it can."""
    if find_spec("xformers") is None:
        return "xformers is not installed"
    if device.type != "cuda":
        return f"xformers needs a CUDA device, not {device.type}"
    if dtype == torch.float64:
        return "xformers takes no float64"
    try:
        import_module("xformers.ops")
    except (ImportError, OSError) as error:
        return f"xformers.ops cannot be imported: {error}"
    return None


def attention(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> Float[Tensor, "N C H W"]:
    """softmax(q k^T / sqrt(D)) v per head; arguments, result and ValueError are those of ``reference.attention``.

    q, k and v are views [N, T, heads, D] of a channels_last input; a copy is made only where D is no multiple of 8.
    """
    n, channels, height, width = qkv_NCHW.shape
    if channels % (3 * num_heads):
        raise ValueError(f"attention got {channels} channels, which do not divide into q, k, v of {num_heads} heads")
    from xformers.ops import memory_efficient_attention

    head_dim = channels // (3 * num_heads)
    qkv_NT3hD = qkv_NCHW.permute(0, 2, 3, 1).reshape(n, height * width, 3, num_heads, head_dim)
    if head_dim % DIVISOR:
        qkv_NT3hD = F.pad(qkv_NT3hD, (0, -head_dim % DIVISOR))
    q, k, v = qkv_NT3hD.unbind(2)
    out_NThD = memory_efficient_attention(q, k, v, scale=head_dim**-0.5)[..., :head_dim]
    out_NCHW = out_NThD.reshape(n, height, width, channels // 3).permute(0, 3, 1, 2)
    return out_NCHW.contiguous(memory_format=torch.channels_last)
