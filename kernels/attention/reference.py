"""Self-attention over pixels in plain PyTorch: the numbers that every backend must reproduce.

Reference: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, Eq. 1.
Shapes: N samples, C = heads * D channels, T = H * W pixels.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> Float[Tensor, "N C H W"]:
    """Every pixel attends to every pixel of its image, per head.

    o = softmax(q k^T / sqrt(D)) v; arXiv 1706.03762, Eq. 1. Softmax statistics are fp32 or better.

    The channels of ``qkv_NCHW`` [N, 3 C, H, W] are ordered (3, heads, D): all of q, then k, then v. The result
    [N, C, H, W] is channels_last; from a channels_last input q, k and v are read in place, without a copy.
    Raises ValueError when the channels do not divide into 3 * num_heads.
    """
    n, channels, height, width = qkv_NCHW.shape
    if channels % (3 * num_heads):
        raise ValueError(f"attention got {channels} channels, which do not divide into q, k, v of {num_heads} heads")
    qkv_NT3hD = qkv_NCHW.permute(0, 2, 3, 1).reshape(n, height * width, 3, num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in qkv_NT3hD.unbind(2))
    out_NhTD = F.scaled_dot_product_attention(q, k, v)
    return out_NhTD.transpose(1, 2).reshape(n, height, width, channels // 3).permute(0, 3, 1, 2)
