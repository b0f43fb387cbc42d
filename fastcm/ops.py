"""The one door to the kernels: each op has one signature here, and this file decides which backend runs it.

A backend is asked for with ``use_backend`` or, for a whole process, with the environment variable FASTCM_BACKEND; the
default, "auto", takes for each op the first available backend of its row in ``_IMPLEMENTATIONS``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from fastcm.errors import ConfigError
from fastcm.kernels.attention import attention as attention_torch
from fastcm.kernels.consistency_loss import consistency_loss as consistency_loss_torch
from fastcm.kernels.group_norm import group_norm as group_norm_torch
from fastcm.kernels.philox import PhiloxKey
from fastcm.kernels.resample import resample as resample_torch

AUTO = "auto"
ENVIRONMENT = "FASTCM_BACKEND"

# Per op the implementations by backend, fastest first; "torch" is the plain PyTorch truth and always there.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "group_norm": {"torch": group_norm_torch},
    "attention": {"torch": attention_torch},
    "resample": {"torch": resample_torch},
    "consistency_loss": {"torch": consistency_loss_torch},
}

_requested = os.environ.get(ENVIRONMENT, AUTO)


class Choice(NamedTuple):
    """The backend that runs an op, and the reason in words."""

    backend: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the block with this backend; "auto" means the fastest available one.

    Compiled functions notice the change and compile again. Not for use from several threads at once.
    Raises ConfigError for a name that no op has.
    """
    global _requested
    _check(name, "use_backend")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def backends() -> dict[str, Choice]:
    """Which backend runs each op now and why, by name of the op; ConfigError when FASTCM_BACKEND names none."""
    return {op: _choose(op) for op in _IMPLEMENTATIONS}


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
    return _implementation("group_norm")(
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
    return _implementation("attention")(qkv_NCHW, num_heads)


def resample(x_NCHW: Float[Tensor, "N C H W"], filter: tuple[float, ...], up: bool) -> Float[Tensor, "N C H2 W2"]:
    """Double (``up``) or halve the resolution with a separable symmetric filter, normalised to sum 1 (2 for up) per axis."""
    return _implementation("resample")(x_NCHW, filter, up)


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
    return _implementation("consistency_loss")(
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


def _implementation(op: str) -> Callable[..., Tensor]:
    return _IMPLEMENTATIONS[op][_choose(op).backend]


def _choose(op: str) -> Choice:
    available = _IMPLEMENTATIONS[op]
    if _requested in available:
        return Choice(_requested, "asked for by name")
    _check(_requested, ENVIRONMENT)
    if _requested != AUTO:
        reason = f"{_requested} does not implement {op}"
    else:
        reason = "fastest available" if len(available) > 1 else "the only implementation so far"
    return Choice(next(iter(available)), reason)


def _check(name: str, source: str) -> None:
    names = [AUTO, *sorted({backend for available in _IMPLEMENTATIONS.values() for backend in available})]
    if name not in names:
        raise ConfigError(f"{source}: there is no backend {name!r} here; choose one of {', '.join(names)}")
