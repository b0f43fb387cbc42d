"""``fastcm::attention``, its backward and its JVP: what torch.compile sees, and the functions in front of them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..runtime.checks import FLOATS, check_no_tangent, check_tensor
from ..runtime.fallback import Result, triton_or_reference
from ..runtime.launch import run
from ..runtime.layout import channels_last
from ..runtime.pinned import architecture
from . import derivatives
from .call import MAX_HEAD_DIM
from .derivatives import empty_image

FLOATS_64 = (*FLOATS, torch.float64)


def attention(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> Float[Tensor, "N C H W"]:
    """Every pixel attends to every pixel of its image, per head, in one kernel; its gradient in one or two.

    o = softmax(q k^T / sqrt(D)) v; arXiv 1706.03762, Eq. 1.

    The channels of ``qkv_NCHW`` [N, 3 C, H, W] are ordered (3, heads, D), any T = H W and D up to 256. q, k and v are read
    in place from channels_last images; the result [N, C, H, W] and the gradient of qkv are dense channels_last. Scores,
    softmax and sums are fp32; weights are rounded to the dtype of qkv for their product with v. Sums have a fixed order and
    gradients repeat bit for bit. fp64 images are computed by plain PyTorch in fp64 on every device.

    Raises ValueError or TypeError, naming the argument, for channels that do not divide into 3 * num_heads, D above 256, a
    dtype that does not fit, and for forward-mode tangents; see ``attention_jvp`` and ``forward_ad``.
    """
    check_arguments(qkv_NCHW, num_heads)
    check_no_tangent("qkv_NCHW", qkv_NCHW, "attention of forward_ad.py or attention_jvp")
    return _attention(channels_last(qkv_NCHW)[0], num_heads)[0]


def attention_jvp(
    qkv_NCHW: Float[Tensor, "N C3 H W"], tqkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int
) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
    """(o, to) of ``attention`` for the tangent ``tqkv_NCHW`` in one kernel; no gradient flows back.

    to = P tv + (P o (tS - rowsum(P o tS))) v with P = softmax(q k^T / sqrt(D)), tS = (tq k^T + q tk^T) / sqrt(D);
    arXiv 2410.11081, Appendix F. The tangent has the shape and dtype of qkv. Errors are those of ``attention``.
    """
    check_arguments(qkv_NCHW, num_heads)
    check_tensor("tqkv_NCHW", tqkv_NCHW, shape=qkv_NCHW.shape, dtypes=(qkv_NCHW.dtype,), device=qkv_NCHW.device)
    return _attention_jvp(channels_last(qkv_NCHW)[0], channels_last(tqkv_NCHW)[0], num_heads)


def check_arguments(qkv_NCHW: Shaped[Tensor, "..."], num_heads: int) -> None:
    """Raise ValueError or TypeError, naming argument and value, for what attention cannot be computed from."""
    if qkv_NCHW.ndim != 4:
        raise ValueError(f"qkv_NCHW has shape {tuple(qkv_NCHW.shape)}, expected four axes (N, 3 C, H, W)")
    check_tensor("qkv_NCHW", qkv_NCHW, dtypes=FLOATS_64)
    channels = qkv_NCHW.shape[1]
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, expected at least 1")
    if channels % (3 * num_heads):
        raise ValueError(f"qkv_NCHW has {channels} channels, which do not divide into q, k, v of num_heads {num_heads}")
    if channels // (3 * num_heads) > MAX_HEAD_DIM:
        raise ValueError(
            f"qkv_NCHW has heads of {channels // (3 * num_heads)} channels; the kernels take up to {MAX_HEAD_DIM}:"
            ' ask for the backend "torch"'
        )


def _on_device(qkv: Tensor, kernel: Callable[[], Result], plain: Callable[[], Result]) -> Result:
    if qkv.dtype == torch.float64 or qkv.numel() == 0:
        return plain()
    return triton_or_reference("attention", qkv.device, kernel, plain)


def _outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    n, channels, height, width = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return empty_image(qkv, channels // 3), torch.empty(n, num_heads, height * width, dtype=dtype, device=qkv.device)


@torch.library.custom_op("fastcm::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    def kernel() -> tuple[Tensor, Tensor]:
        from .forward import forward_launches

        outputs = _outputs(qkv, num_heads)
        run(forward_launches(*channels_last(qkv), num_heads, *outputs, architecture(qkv.device)), qkv.device)
        return outputs

    return _on_device(qkv, kernel, lambda: derivatives.forward(qkv, num_heads))


@_attention.register_fake
def _(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, num_heads)


@torch.library.custom_op("fastcm::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    def kernel() -> Tensor:
        from .backward import backward_launches

        dqkv = empty_image(qkv, qkv.shape[1])
        images = (*channels_last(dout.to(qkv.dtype)), *channels_last(qkv), *channels_last(out))
        run(backward_launches(*images, lse.contiguous(), num_heads, dqkv, architecture(qkv.device)), qkv.device)
        return dqkv

    return _on_device(qkv, kernel, lambda: derivatives.backward(dout, qkv, out, lse, num_heads))


@_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    return empty_image(qkv, qkv.shape[1])


@torch.library.custom_op("fastcm::attention_jvp", mutates_args=())
def _attention_jvp(qkv: Tensor, tqkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    def kernel() -> tuple[Tensor, Tensor]:
        from .jvp import jvp_launches

        outputs = empty_image(qkv, qkv.shape[1] // 3), empty_image(qkv, qkv.shape[1] // 3)
        images = (*channels_last(qkv), *channels_last(tqkv))
        run(jvp_launches(*images, num_heads, *outputs, architecture(qkv.device)), qkv.device)
        return outputs

    return _on_device(qkv, kernel, lambda: derivatives.jvp(qkv, tqkv, num_heads))


@_attention_jvp.register_fake
def _(qkv: Tensor, tqkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    return empty_image(qkv, qkv.shape[1] // 3), empty_image(qkv, qkv.shape[1] // 3)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _attention_backward(dout, *ctx.saved_tensors, ctx.num_heads), None


_attention.register_autograd(_differentiate, setup_context=_setup_context)
