"""Group norm and its derivatives in closed form, in plain PyTorch: what the registered ops run where Triton cannot.

Everything is computed in fp32 (fp64 for fp64 input) and rounded once at the end. Shapes: N samples, P pixels, C channels, G
groups; images are seen as [N, P, C]. The formulas stand in ``backward.py`` and ``jvp.py``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..philox import random_bits
from .call import Call, Gradients, Tangents, compute_dtype
from .two_pass import group_mean, swapped, two_pass_forward


def forward(call: Call) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N G"], Float[Tensor, "N G"]]:
    """(y, mean, 1 / standard deviation); y is dense channels_last in the dtype of x."""
    z_NPC, mean_NG, rstd_NG = _normalise(call)
    y_NPC = F.silu(z_NPC, inplace=True) if call.silu else z_NPC
    return _image(_drop(call, y_NPC), call), mean_NG, rstd_NG


def backward(
    call: Call,
    dy_NCHW: Float[Tensor, "N C H W"],
    mean_NG: Float[Tensor, "N G"],
    rstd_NG: Float[Tensor, "N G"],
    needs: list[bool],
) -> Gradients:
    """The gradients that ``needs`` asks for, in the order x, weight, bias, addend, scale, shift."""
    centred_NPC, rstd_NC = _centred(call, mean_NG), _of_channels(rstd_NG, call)
    a_NC, b_NC = _modulation(call)
    slope_NC = rstd_NC * a_NC
    dz_NPC = _drop(call, _pixels(dy_NCHW, mean_NG.dtype))
    if call.silu:
        dz_NPC = torch.ops.aten.silu_backward(dz_NPC, torch.addcmul(b_NC[:, None], centred_NPC, slope_NC[:, None]))
    B_NC = dz_NPC.sum(1)
    A_NC = (dz_NPC * centred_NPC).sum(1) * rstd_NC
    dx_NPC = None
    if needs[0] or needs[3]:
        along_NC = -rstd_NC * rstd_NC * group_mean(a_NC * A_NC, call.num_groups) / call.num_pixels
        constant_NC = -rstd_NC * group_mean(a_NC * B_NC, call.num_groups) / call.num_pixels
        dx_NPC = torch.addcmul(constant_NC[:, None], centred_NPC, along_NC[:, None]).addcmul_(dz_NPC, slope_NC[:, None])
    gain_NC = 1 if call.scale_NC is None else 1 + call.scale_NC.to(mean_NG.dtype)
    weight_C, bias_C = call.weight_C.to(mean_NG.dtype), call.bias_C.to(mean_NG.dtype)
    return Gradients(
        _image(dx_NPC, call) if needs[0] else None,
        (gain_NC * A_NC).sum(0).to(call.weight_C.dtype) if needs[1] else None,
        (gain_NC * B_NC).sum(0).to(call.bias_C.dtype) if needs[2] else None,
        dx_NPC.sum(1).to(call.addend_NC.dtype) if needs[3] else None,
        (weight_C * A_NC + bias_C * B_NC).to(call.scale_NC.dtype) if needs[4] else None,
        B_NC.to(call.shift_NC.dtype, copy=True) if needs[5] else None,
    )


def jvp(call: Call, tangents: Tangents) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N C H W"]]:
    """(y, ty), dense channels_last in the dtype of x."""
    z_NPC, mean_NG, rstd_NG = _normalise(call)
    dtype, num_groups = mean_NG.dtype, call.num_groups
    centred_NPC, rstd_NC = _centred(call, mean_NG), _of_channels(rstd_NG, call)
    tx_NPC = _pixels(tangents.tx_NCHW, dtype)
    if tangents.taddend_NC is not None:
        tx_NPC = tx_NPC + tangents.taddend_NC.to(dtype)[:, None]
    tmean_NC = group_mean(tx_NPC.mean(1), num_groups)
    along_NC = rstd_NC * rstd_NC * group_mean((centred_NPC * tx_NPC).mean(1), num_groups)
    slope_NC = rstd_NC * _modulation(call)[0]
    ta_NC = tb_NC = mean_NG.new_zeros(1, 1)
    if tangents.tscale_NC is not None:
        tscale_NC = tangents.tscale_NC.to(dtype)
        ta_NC, tb_NC = call.weight_C.to(dtype) * tscale_NC, call.bias_C.to(dtype) * tscale_NC
    if tangents.tshift_NC is not None:
        tb_NC = tb_NC + tangents.tshift_NC.to(dtype)
    factor_NC = rstd_NC * ta_NC - slope_NC * along_NC
    ty_NPC = torch.addcmul((tb_NC - slope_NC * tmean_NC)[:, None], centred_NPC, factor_NC[:, None])
    ty_NPC.addcmul_(tx_NPC, slope_NC[:, None])
    y_NPC = F.silu(z_NPC) if call.silu else z_NPC
    if call.silu:
        ty_NPC = torch.ops.aten.silu_backward(ty_NPC, z_NPC)  # the same factor, silu'(z)
    return _image(_drop(call, y_NPC), call), _image(_drop(call, ty_NPC), call)


def _normalise(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(z as [N, P, C], mean, 1 / standard deviation as [N, G])."""
    dtype, per_group = compute_dtype(call.x_NCHW), call.x_NCHW.shape[1] // call.num_groups
    addend_NC = None if call.addend_NC is None else call.addend_NC.to(dtype)
    found = two_pass_forward(swapped(call.x_NCHW.to(dtype)), addend_NC, *_modulation(call), call.num_groups, call.eps)
    z_NPC = found.y_HWNC.permute(2, 0, 1, 3).flatten(1, 2)
    return z_NPC, found.mean_NC[:, ::per_group].contiguous(), found.rstd_NC[:, ::per_group].contiguous()


def _modulation(call: Call) -> tuple[Tensor, Tensor]:
    """(a, b) of z = a xh + b, one row for all samples where nothing differs between them."""
    dtype = compute_dtype(call.x_NCHW)
    a_NC, b_NC = call.weight_C.to(dtype)[None], call.bias_C.to(dtype)[None]
    if call.scale_NC is not None:
        gain_NC = 1 + call.scale_NC.to(dtype)
        a_NC, b_NC = a_NC * gain_NC, b_NC * gain_NC
    return a_NC, b_NC if call.shift_NC is None else b_NC + call.shift_NC.to(dtype)


def _centred(call: Call, mean_NG: Tensor) -> Tensor:
    minus_NC = _of_channels(mean_NG, call)
    if call.addend_NC is not None:
        minus_NC = minus_NC - call.addend_NC.to(mean_NG.dtype)
    return _pixels(call.x_NCHW, mean_NG.dtype) - minus_NC[:, None]


def _of_channels(value_NG: Tensor, call: Call) -> Tensor:
    return value_NG[:, :, None].expand(-1, -1, call.x_NCHW.shape[1] // call.num_groups).flatten(1)


def _drop(call: Call, value_NPC: Tensor) -> Tensor:
    key = call.dropout_key
    if key is None:
        return value_NPC
    bits = random_bits(key, value_NPC[0].numel() if len(value_NPC) else 0)
    mask = (bits >= round(call.dropout * 2**32)).view(value_NPC.shape)
    return torch.where(mask, value_NPC / (1 - call.dropout), 0)


def _pixels(x_NCHW: Tensor, dtype: torch.dtype) -> Tensor:
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2).to(dtype)


def _image(value_NPC: Tensor, call: Call) -> Tensor:
    """[N, P, C] as a dense channels_last image of the dtype of x."""
    n, channels, height, width = call.x_NCHW.shape
    return value_NPC.to(call.x_NCHW.dtype).contiguous().view(n, height, width, channels).permute(0, 3, 1, 2)
