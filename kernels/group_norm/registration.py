"""``fastcm::group_norm``, its backward and its JVP: what torch.compile sees, and the functions in front of them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..philox import PhiloxKey
from ..runtime.checks import FLOATS, check_no_tangent, check_tensor
from ..runtime.fallback import Result, triton_or_reference
from ..runtime.launch import run
from ..runtime.layout import channels_last
from ..runtime.pinned import architecture
from . import derivatives
from .call import Call, Gradients, Tangents, compute_dtype
from .reference import memory_format

FLOATS_64 = (*FLOATS, torch.float64)
DIFFERENTIABLE = (0, 2, 3, 5, 6, 7)  # x, weight, bias, addend, scale, shift among the arguments of the op
TENSORS = (*DIFFERENTIABLE, 10)  # and the sample indices of the dropout key


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
    """Normalise groups of channels, then modulate, activate and drop out, in one kernel; its gradient in one or two.

    y = dropout(silu(norm(x + addend) (1 + scale) + shift)), norm(x) = (x - mean) / sqrt(var + eps) * weight + bias,
    mean and var over the pixels and channels of one group of one sample; arXiv 1803.08494, Eq. 1 and 2.

    Statistics and arithmetic are fp32, rounded once at the end; sums have a fixed order and results repeat bit for bit.
    The result has the dtype and memory format of x; channels_last images, and slices of their channels, are read in
    place. Dropout is that of the reference: no key or ``dropout`` 0 means none, and its mask is drawn again in backward.
    fp64 images are computed by plain PyTorch in fp64 on every device.

    Raises ValueError or TypeError, naming the argument, for shapes, dtypes or devices that do not fit, groups that do not
    divide the channels, dropout outside [0, 1) and for forward-mode tangents; see ``group_norm_jvp`` and ``forward_ad``.
    """
    call = checked_call(x_NCHW, num_groups, weight_C, bias_C, eps, addend_NC, scale_NC, shift_NC, silu, dropout, dropout_key)
    for name, value in zip(Call._fields, call, strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            check_no_tangent(name, value, "group_norm of forward_ad.py or group_norm_jvp")
    return _norm(*call)[0].contiguous(memory_format=memory_format(x_NCHW))


def group_norm_jvp(
    x_NCHW: Float[Tensor, "N C H W"],
    tx_NCHW: Float[Tensor, "N C H W"],
    num_groups: int,
    weight_C: Float[Tensor, " C"],
    bias_C: Float[Tensor, " C"],
    eps: float,
    *,
    addend_NC: Float[Tensor, "N C"] | None = None,
    taddend_NC: Float[Tensor, "N C"] | None = None,
    scale_NC: Float[Tensor, "N C"] | None = None,
    tscale_NC: Float[Tensor, "N C"] | None = None,
    shift_NC: Float[Tensor, "N C"] | None = None,
    tshift_NC: Float[Tensor, "N C"] | None = None,
    silu: bool = False,
    dropout: float = 0.0,
    dropout_key: PhiloxKey | None = None,
) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
    """(y, ty) of ``group_norm`` for the tangents tx, taddend, tscale and tshift (None means 0); no gradient flows back.

    ty = dropout(silu'(z) tz), tz = a txh + ta xh + tb, txh = rstd (tx' - m(tx') - xh m(xh tx')) with tx' = tx + taddend,
    a = weight (1 + scale), ta = weight tscale, tb = bias tscale + tshift and m the mean over a group. ty has the dtype of
    x. Arguments and errors are otherwise those of ``group_norm``.
    """
    call = checked_call(x_NCHW, num_groups, weight_C, bias_C, eps, addend_NC, scale_NC, shift_NC, silu, dropout, dropout_key)
    y, ty = _norm_jvp(*checked_tangents(x_NCHW, tx_NCHW, taddend_NC, tscale_NC, tshift_NC), *call)
    format = memory_format(x_NCHW)
    return y.contiguous(memory_format=format), ty.contiguous(memory_format=format)


def checked_call(
    x_NCHW: Shaped[Tensor, "..."],
    num_groups: int,
    weight_C: Shaped[Tensor, "..."],
    bias_C: Shaped[Tensor, "..."],
    eps: float,
    addend_NC: Shaped[Tensor, "..."] | None,
    scale_NC: Shaped[Tensor, "..."] | None,
    shift_NC: Shaped[Tensor, "..."] | None,
    silu: bool,
    dropout: float,
    dropout_key: PhiloxKey | None,
) -> Call:
    """The arguments of the ops; ValueError or TypeError, naming argument and value, for what cannot be computed."""
    if x_NCHW.ndim != 4:
        raise ValueError(f"x_NCHW has shape {tuple(x_NCHW.shape)}, expected four axes (N, C, H, W)")
    n, channels, height, width = x_NCHW.shape
    check_tensor("x_NCHW", x_NCHW, dtypes=FLOATS_64)
    if height * width == 0:
        raise ValueError(f"x_NCHW has shape {tuple(x_NCHW.shape)}, expected images that have a pixel")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, which does not divide the {channels} channels of x_NCHW")
    if not 0 <= dropout < 1 or round(dropout * 2**32) == 2**32:
        raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
    vectors = {"weight_C": weight_C, "bias_C": bias_C}
    rows = {"addend_NC": addend_NC, "scale_NC": scale_NC, "shift_NC": shift_NC}
    for shape, values in (((channels,), vectors), ((n, channels), rows)):
        for name, value in values.items():
            if value is not None:
                check_tensor(name, value, shape=shape, dtypes=_dtypes(x_NCHW), device=x_NCHW.device)
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    arguments = (channels_last(x_NCHW)[0], num_groups, weight_C, bias_C, float(eps), *rows.values(), silu)
    if dropout_key is None or round(dropout * 2**32) == 0:
        return Call(*arguments)
    index_N = dropout_key.index_N
    check_tensor("dropout_key.index_N", index_N, shape=(n,), dtypes=(torch.int64,), device=x_NCHW.device)
    return Call(*arguments, float(dropout), index_N.contiguous(), *dropout_key.key, dropout_key.draw)


def checked_tangents(
    x_NCHW: Shaped[Tensor, "..."],
    tx_NCHW: Shaped[Tensor, "..."],
    taddend_NC: Shaped[Tensor, "..."] | None,
    tscale_NC: Shaped[Tensor, "..."] | None,
    tshift_NC: Shaped[Tensor, "..."] | None,
) -> Tangents:
    """The tangents as the op takes them; ValueError or TypeError, naming argument and value, for what does not fit x."""
    check_tensor("tx_NCHW", tx_NCHW, shape=x_NCHW.shape, dtypes=_dtypes(x_NCHW), device=x_NCHW.device)
    rows = {"taddend_NC": taddend_NC, "tscale_NC": tscale_NC, "tshift_NC": tshift_NC}
    for name, value in rows.items():
        if value is not None:
            check_tensor(name, value, shape=x_NCHW.shape[:2], dtypes=_dtypes(x_NCHW), device=x_NCHW.device)
    return Tangents(channels_last(tx_NCHW)[0], *rows.values())


def _dtypes(x_NCHW: Tensor) -> tuple[torch.dtype, ...]:
    return FLOATS_64 if x_NCHW.dtype == torch.float64 else FLOATS


def _on_device(call: Call, kernel: Callable[[], Result], plain: Callable[[], Result]) -> Result:
    if call.x_NCHW.dtype == torch.float64 or call.x_NCHW.numel() == 0:
        return plain()
    return triton_or_reference("group_norm", call.x_NCHW.device, kernel, plain)


def _image(like_NCHW: Tensor) -> Tensor:
    n, channels, height, width = like_NCHW.shape
    return torch.empty(n, height, width, channels, dtype=like_NCHW.dtype, device=like_NCHW.device).permute(0, 3, 1, 2)


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, size = call.x_NCHW, (call.x_NCHW.shape[0], call.num_groups)
    mean, rstd = (torch.empty(size, dtype=compute_dtype(x), device=x.device) for _ in range(2))
    return _image(x), mean, rstd


@torch.library.custom_op("fastcm::group_norm", mutates_args=())
def _norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    addend: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    index: Tensor | None,
    key0: int,
    key1: int,
    draw: int,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(x, num_groups, weight, bias, eps, addend, scale, shift, silu, dropout, index, key0, key1, draw)

    def kernel() -> tuple[Tensor, Tensor, Tensor]:
        from .forward import forward_launches

        outputs = _outputs(call)
        run(forward_launches(call, *outputs, architecture(x.device)), x.device)
        return outputs

    return _on_device(call, kernel, lambda: derivatives.forward(call))


@_norm.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(Call(*arguments))


@torch.library.custom_op("fastcm::group_norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    addend: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    index: Tensor | None,
    key0: int,
    key1: int,
    draw: int,
    needs: list[bool],
) -> list[Tensor]:
    call = Call(x, num_groups, weight, bias, eps, addend, scale, shift, silu, dropout, index, key0, key1, draw)

    def kernel() -> list[Tensor]:
        from .backward import backward_launches

        wider = [needs[0] or needs[3], needs[1] or needs[2], needs[1] or needs[2], *needs[3:]]
        outputs = _gradients(call, wider)
        run(backward_launches(call, dy, mean, rstd, outputs, architecture(x.device)), x.device)
        return [value for value, needed in zip(outputs, needs, strict=True) if needed]

    def plain() -> list[Tensor]:
        return [value for value in derivatives.backward(call, dy, mean, rstd, needs) if value is not None]

    return _on_device(call, kernel, plain)


@_norm_backward.register_fake
def _(dy: Tensor, mean: Tensor, rstd: Tensor, *others: Any) -> list[Tensor]:
    *arguments, needs = others
    return [value for value in _gradients(Call(*arguments), needs) if value is not None]


def _gradients(call: Call, needs: list[bool]) -> Gradients:
    """Memory for the gradients that are needed."""
    values = [call[place] for place in DIFFERENTIABLE]
    allocate = [_image, *[lambda value: torch.empty(value.shape, dtype=value.dtype, device=value.device)] * 5]
    return Gradients(*(new(value) if needed else None for new, value, needed in zip(allocate, values, needs, strict=True)))


@torch.library.custom_op("fastcm::group_norm_jvp", mutates_args=())
def _norm_jvp(
    tx: Tensor,
    taddend: Tensor | None,
    tscale: Tensor | None,
    tshift: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    addend: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    dropout: float,
    index: Tensor | None,
    key0: int,
    key1: int,
    draw: int,
) -> tuple[Tensor, Tensor]:
    call = Call(x, num_groups, weight, bias, eps, addend, scale, shift, silu, dropout, index, key0, key1, draw)
    tangents = Tangents(tx, taddend, tscale, tshift)

    def kernel() -> tuple[Tensor, Tensor]:
        from .jvp import jvp_launches

        outputs = _image(x), _image(x)
        run(jvp_launches(call, tangents, *outputs, architecture(x.device)), x.device)
        return outputs

    return _on_device(call, kernel, lambda: derivatives.jvp(call, tangents))


@_norm_jvp.register_fake
def _(tx: Tensor, taddend: Tensor | None, tscale: Tensor | None, tshift: Tensor | None, *call: Any) -> tuple[Tensor, Tensor]:
    return _image(call[0]), _image(call[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.plain = split_tensors(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    mean, rstd, *tensors = ctx.saved_tensors
    return all_gradients(dy, mean, rstd, join_tensors(tensors, ctx.plain), ctx.needs_input_grad)


def all_gradients(
    dy: Float[Tensor, "N C H W"], mean: Float[Tensor, "N G"], rstd: Float[Tensor, "N G"], call: Call, needed: tuple[bool, ...]
) -> tuple[Float[Tensor, "..."] | None, ...]:
    """The gradient of each argument of the op, None where there is none or where it is not needed."""
    needs = [needed[place] for place in DIFFERENTIABLE]
    found = iter(_norm_backward(dy, mean, rstd, *call, needs))
    gradients: list[Tensor | None] = [None] * len(call)
    for place, is_needed in zip(DIFFERENTIABLE, needs, strict=True):
        gradients[place] = next(found) if is_needed else None
    return tuple(gradients)


def split_tensors(inputs: tuple[Any, ...]) -> tuple[list[Shaped[Tensor, "..."] | None], tuple[Any, ...]]:
    """The tensors among the arguments of the op, which autograd must keep, and the others."""
    return [inputs[place] for place in TENSORS], tuple(value for place, value in enumerate(inputs) if place not in TENSORS)


def join_tensors(tensors: list[Shaped[Tensor, "..."] | None], plain: tuple[Any, ...]) -> Call:
    """The call that ``split_tensors`` took apart."""
    kept, others = iter(tensors), iter(plain)
    return Call(*(next(kept if place in TENSORS else others) for place in range(len(Call._fields))))


_norm.register_autograd(_differentiate, setup_context=_setup_context)
