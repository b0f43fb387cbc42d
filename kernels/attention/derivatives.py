"""Attention, its gradient and its tangent in closed form, plain PyTorch: what the registered ops compute without Triton.

With S = q k^T / sqrt(D), P = softmax(S) = exp(S - lse), O = P v (arXiv 1706.03762, Eq. 1), per sample and head:
dv = P^T dO, dS = P o (dO v^T - rowsum(dO o O)), dq = dS k / sqrt(D), dk = dS^T q / sqrt(D) (arXiv 2205.14135, Appendix B.4);
tS = (tq k^T + q tk^T) / sqrt(D), tO = P tv + (P o (tS - rowsum(P o tS))) v (arXiv 2410.11081, Appendix F).
All in fp32 (fp64 for fp64), rounded once at the end.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def forward(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N h T"]]:
    """(O, lse): the output, dense channels_last, and the logarithm of each query's sum of exponentials."""
    q, k, v = _heads(qkv_NCHW, 3, num_heads)
    scores = _scores(q, k)
    lse_NhT = torch.logsumexp(scores, dim=-1)
    return _image((scores - lse_NhT[..., None]).exp() @ v, qkv_NCHW), lse_NhT


def backward(
    dout_NCHW: Float[Tensor, "N C H W"],
    qkv_NCHW: Float[Tensor, "N C3 H W"],
    out_NCHW: Float[Tensor, "N C H W"],
    lse_NhT: Float[Tensor, "N h T"],
    num_heads: int,
) -> Float[Tensor, "N C3 H W"]:
    """The gradient of qkv, dense channels_last."""
    q, k, v = _heads(qkv_NCHW, 3, num_heads)
    (o,), (do,) = (_heads(image, 1, num_heads) for image in (out_NCHW, dout_NCHW))
    p = (_scores(q, k) - lse_NhT[..., None]).exp()
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return _image(torch.stack((ds @ k, ds.mT @ q, p.mT @ do), dim=1).flatten(1, 2), qkv_NCHW)


def jvp(
    qkv_NCHW: Float[Tensor, "N C3 H W"], tqkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int
) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
    """(O, tO) for the tangent of qkv, dense channels_last."""
    q, k, v = _heads(qkv_NCHW, 3, num_heads)
    tq, tk, tv = _heads(tqkv_NCHW, 3, num_heads)
    p = torch.softmax(_scores(q, k), dim=-1)
    ts = _scores(tq, k) + _scores(q, tk)
    h = p * (ts - (p * ts).sum(-1, keepdim=True))
    return _image(p @ v, qkv_NCHW), _image(p @ tv + h @ v, qkv_NCHW)


def empty_image(like_NCHW: Shaped[Tensor, "N C H W"], channels: int) -> Shaped[Tensor, "N C2 H W"]:
    """Memory for dense channels_last images of another number of channels."""
    n, _, height, width = like_NCHW.shape
    return torch.empty(n, height, width, channels, dtype=like_NCHW.dtype, device=like_NCHW.device).permute(0, 3, 1, 2)


def _heads(x_NCHW: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[N, h, T, D] of each part in the dtype of the arithmetic."""
    n, channels, height, width = x_NCHW.shape
    wide = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    wide = wide.permute(0, 2, 3, 1).reshape(n, height * width, parts, num_heads, channels // (parts * num_heads))
    return wide.permute(2, 0, 3, 1, 4).unbind(0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) / q.shape[-1] ** 0.5


def _image(x_NhTD: Tensor, like_NCHW: Tensor) -> Tensor:
    """Heads side by side again, in the dtype and with the pixels of ``like_NCHW``."""
    out = empty_image(like_NCHW, x_NhTD.shape[1] * x_NhTD.shape[3])
    return out.copy_(x_NhTD.transpose(2, 3).reshape(out.shape))
