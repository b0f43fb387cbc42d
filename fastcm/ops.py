"""The one door to the kernels: each op has one signature here; ``fastcm.backends`` decides which implementation runs."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastcm import backends
from fastcm.backends import TORCH, TRITON, Backend, Choice, triton_unavailable, use_backend
from fastcm.kernels import attention as attention_kernels
from fastcm.kernels import consistency_loss as consistency_loss_kernels
from fastcm.kernels import group_norm as group_norm_kernels
from fastcm.kernels import noise as noise_kernels
from fastcm.kernels import optimizer as optimizer_kernels
from fastcm.kernels.consistency_loss import DISTANCES
from fastcm.kernels.noise import NoisedInputs
from fastcm.kernels.optimizer import FlatLayout
from fastcm.kernels.philox import PhiloxKey
from fastcm.kernels.resample import resample as resample_torch
from fastcm.kernels.runtime.fallback import failures, is_strict
from fastcm.kernels.runtime.pinned import ARCHITECTURES, architecture

__all__ = [
    "DISTANCES",
    "FlatLayout",
    "add_noise",
    "attention",
    "attention_table",
    "choices",
    "consistency_loss",
    "group_norm",
    "optimizer_step",
    "resample",
    "use_backend",
]


def _triton(run: Callable[..., Any]) -> Backend:
    return Backend(run, triton_unavailable)


# Per op its backends, fastest first; the last, "torch", is the plain PyTorch truth and runs anywhere.
TABLE: dict[str, dict[str, Backend]] = {
    "group_norm": {
        TRITON: _triton(group_norm_kernels.group_norm),
        TORCH: Backend(group_norm_kernels.group_norm_reference),
    },
    "attention": {
        TRITON: _triton(attention_kernels.attention),
        "xformers": Backend(attention_kernels.attention_xformers, attention_kernels.xformers_unavailable),
        TORCH: Backend(attention_kernels.attention_reference),
    },
    "add_noise": {
        TRITON: _triton(noise_kernels.add_noise),
        TORCH: Backend(noise_kernels.add_noise_reference),
    },
    "consistency_loss": {
        TRITON: _triton(consistency_loss_kernels.consistency_loss),
        TORCH: Backend(consistency_loss_kernels.consistency_loss_reference),
    },
    "resample": {TORCH: Backend(resample_torch)},
    "adam_step": {
        TRITON: _triton(optimizer_kernels.optimizer_step),
        "apex": Backend(
            optimizer_kernels.optimizer_step_apex, lambda device, dtype: optimizer_kernels.apex_unavailable("adam")
        ),
        TORCH: Backend(optimizer_kernels.optimizer_step_reference),
    },
    "radam_step": {
        TRITON: _triton(optimizer_kernels.optimizer_step),
        TORCH: Backend(optimizer_kernels.optimizer_step_reference),
    },
}
backends.register(TABLE)


def choices(device: torch.device | str | None = None) -> dict[str, Choice]:
    """Which backend runs each op on a device (default: CUDA where there is one) for fp32 images, and why.

    Raises ConfigError when FASTCM_BACKEND names none, KernelUnavailableError for a fallback under ``strict``.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = {op: backends.choose(op, row, device, torch.float32) for op, row in TABLE.items()}
    failed = {op: Choice(TORCH, f"the Triton kernel failed to compile: {why}") for op, why in failures().items() if op in found}
    return found | failed


def attention_table() -> dict[str, list[str]]:
    """Which backend attention prefers, by architecture: a line per rule, the first that fits a call counts.

    ``choices`` tells whether the preferred one can run; where it cannot, the next of its row does.
    """
    return {arch: attention_kernels.dispatch_rules(arch) for arch in ARCHITECTURES}


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
    """Group normalisation: y = dropout(silu(norm(x + addend) (1 + scale) + shift)), statistics in fp32 or better.

    dtype and memory format are those of x; no dropout without a key. arXiv 1803.08494, Eq. 1 and 2.
    """
    return _implementation("group_norm", x_NCHW)(
        x_NCHW,
        num_groups,
        weight_C,
        bias_C,
        eps,
        addend_NC=addend_NC,
        scale_NC=scale_NC,
        shift_NC=shift_NC,
        silu=silu,
        dropout=dropout,
        dropout_key=dropout_key,
    )


def attention(qkv_NCHW: Float[Tensor, "N C3 H W"], num_heads: int) -> Float[Tensor, "N C H W"]:
    """Self-attention over pixels: softmax(q k^T / sqrt(D)) v, qkv channels ordered (3, heads, D); arXiv 1706.03762, Eq. 1."""
    tokens, head_dim = qkv_NCHW.shape[2] * qkv_NCHW.shape[3], qkv_NCHW.shape[1] // (3 * num_heads)
    preferred = _preferred_attention(tokens, head_dim, qkv_NCHW.device.type, qkv_NCHW.device.index)
    return _implementation("attention", qkv_NCHW, preferred)(qkv_NCHW, num_heads)


def resample(x_NCHW: Float[Tensor, "N C H W"], filter: tuple[float, ...], up: bool) -> Float[Tensor, "N C H2 W2"]:
    """Double (``up``) or halve the resolution with a separable symmetric filter, normalised to sum 1 (2 for up) per axis."""
    return _implementation("resample", x_NCHW)(x_NCHW, filter, up)


def add_noise(
    clean_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    c_in_t_N: Float[Tensor, " N"],
    *,
    r_N: Float[Tensor, " N"] | None = None,
    c_in_r_N: Float[Tensor, " N"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> NoisedInputs:
    """Images at one or two noise levels with one noise, and the network's inputs: x_t = y + t n, input_t = c_in_t x_t.

    n is given as images or as the key to draw it. Not differentiable. arXiv 2206.00364, Eq. 7; arXiv 2303.01469, Eq. 10.
    """
    return _implementation("add_noise", clean_NCHW)(clean_NCHW, noise, t_N, c_in_t_N, r_N=r_N, c_in_r_N=c_in_r_N, dtype=dtype)


def consistency_loss(
    F_t: Float[Tensor, "N C H W"],
    x_t: Float[Tensor, "N C H W"],
    c_skip_t: Float[Tensor, " N"],
    c_out_t: Float[Tensor, " N"],
    clean: Float[Tensor, "N C H W"],
    weight_N: Float[Tensor, " N"],
    *,
    F_r: Float[Tensor, "N C H W"] | None = None,
    x_r: Float[Tensor, "N C H W"] | None = None,
    c_skip_r: Float[Tensor, " N"] | None = None,
    c_out_r: Float[Tensor, " N"] | None = None,
    boundary_N: Bool[Tensor, " N"] | None = None,
    distance: str = "l2",
    c: float = 0.0,
) -> Float[Tensor, " N"]:
    """Weighted distance per sample of D_t = c_skip_t x_t + c_out_t F_t to its target, which carries no gradient.

    The target is D_r of the teacher, or ``clean`` where ``boundary_N`` or without a teacher; distance "squared" S,
    "l2" sqrt(S) or "pseudo_huber" sqrt(S + c^2) - c of the sum S of squares over pixels. arXiv 2310.14189, section 3.3.
    """
    return _implementation("consistency_loss", F_t)(
        F_t,
        x_t,
        c_skip_t,
        c_out_t,
        clean,
        weight_N,
        F_r=F_r,
        x_r=x_r,
        c_skip_r=c_skip_r,
        c_out_r=c_out_r,
        boundary_N=boundary_N,
        distance=distance,
        c=c,
    )


def optimizer_step(
    params: Sequence[Float[Tensor, "..."]],
    grads: Sequence[Float[Tensor, "..."] | None],
    exp_avg_P: Float[Tensor, " P"],
    exp_avg_sq_P: Float[Tensor, " P"],
    num_steps: Float[Tensor, ""],
    lr: Float[Tensor, ""],
    *,
    kind: str,
    betas: tuple[float, float],
    eps: float,
    loss_scale: Float[Tensor, ""] | None = None,
    averages: Sequence[Float[Tensor, " P"]] = (),
    ema_betas: Float[Tensor, " K"] | None = None,
    copy_P: Float[Tensor, " P"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Apply gradients by "adam" or "radam", let averages and a low-precision copy follow, all in place: (finite, norm).

    Where the norm is not finite nothing changes. arXiv 1412.6980, Alg. 1; arXiv 1908.03265, Alg. 2.
    """
    return _implementation(f"{kind}_step", exp_avg_P)(
        params,
        grads,
        exp_avg_P,
        exp_avg_sq_P,
        num_steps,
        lr,
        kind=kind,
        betas=betas,
        eps=eps,
        loss_scale=loss_scale,
        averages=averages,
        ema_betas=ema_betas,
        copy_P=copy_P,
    )


def _implementation(op: str, images: Tensor, preferred: str | None = None) -> Callable[..., Any]:
    device = images.device
    return TABLE[op][_backend(op, backends.requested(), device.type, device.index, images.dtype, preferred)].run


@torch.compiler.assume_constant_result
def _backend(
    op: str, requested: str, device_type: str, device_index: int | None, dtype: torch.dtype, preferred: str | None
) -> str:
    """The name of the backend; ``requested`` is an argument so that a compiled function is compiled again when it changes."""
    return _chosen(op, requested, is_strict(), device_type, device_index, dtype, preferred)


@lru_cache(maxsize=1024)
def _chosen(
    op: str,
    requested: str,
    strict: bool,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    preferred: str | None,
) -> str:
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    return backends.choose(op, TABLE[op], device, dtype, preferred).backend


@torch.compiler.assume_constant_result
def _preferred_attention(tokens: int, head_dim: int, device_type: str, device_index: int | None) -> str | None:
    """The backend that the architecture's table names for a shape; a CPU has no table."""
    if device_type != "cuda":
        return None
    return attention_kernels.preferred_backend(tokens, head_dim, architecture(torch.device(device_type, device_index)))
