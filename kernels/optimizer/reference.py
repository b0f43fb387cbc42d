"""One optimizer step in plain PyTorch: unscale, finite check, Adam or RAdam, weight averages, low-precision weight copy.

The truth for every other backend, in the precision of the moments (fp32; fp64 in tests). T parameters, K averages, P
elements of a flat tensor (layout.py).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..runtime.host import on_cpu
from .layout import copy_present, flat_views

KINDS = ("adam", "radam")
CPU_PART = 65536  # elements
RECTIFIED_ABOVE = 5.0  # RAdam leaves the variance out while rho_t is not above it


@torch.no_grad()
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
    """Apply gradients in place: (finite, norm), two 0-d tensors.

    g <- g / loss_scale; norm = |g|_2; finite = 1 where the norm is a finite number, else 0.
    Where finite: t <- t + 1; m <- m + (1 - beta1) (g - m); v <- v + (1 - beta2) (g^2 - v);
    p <- p - a m / (s sqrt(v) + e) with the scalars of ``step_scalars``; each average by
    ema <- ema + (1 - beta_k) (p - ema); copy <- p in its dtype. Elsewhere nothing changes, not one bit.

    params: T dense tensors, changed in place; grads: their gradients in any memory, None counting as zeros;
    exp_avg_P (m), exp_avg_sq_P (v), averages and copy_P: flat, in the memory order of the parameters; num_steps: t.
    arXiv 1412.6980, Alg. 1 (Adam); arXiv 1908.03265, Alg. 2 (RAdam); arXiv 2206.00364, appendix F.2 (average).
    """
    grad_P = torch.zeros_like(exp_avg_P)
    views = flat_views(params, grad_P)
    copy_present(views, grads)
    if loss_scale is not None:
        grad_P *= loss_scale.to(grad_P.dtype).reciprocal()
    norm = torch.linalg.vector_norm(grad_P)
    is_finite = norm.isfinite()
    num_steps += is_finite
    a, s, e = (scalar.to(grad_P.dtype) for scalar in step_scalars(num_steps, lr, kind, betas, eps))
    if on_cpu(grad_P) and not is_finite:
        return is_finite.to(grad_P.dtype), norm
    for part in _parts(grad_P):
        _update(exp_avg_P[part], exp_avg_sq_P[part], grad_P[part], is_finite, betas, (a, s, e))
    torch._foreach_add_(list(params), views)
    _follow(params, is_finite, averages, ema_betas, copy_P, views, grad_P)
    return is_finite.to(grad_P.dtype), norm


def _parts(flat_P: Tensor) -> list[slice]:
    """The ranges to work on at a time: on a CPU small enough that what is computed in between stays in its cache."""
    size = CPU_PART if on_cpu(flat_P) else max(len(flat_P), 1)
    return [slice(start, start + size) for start in range(0, len(flat_P), size)]


def _update(
    m: Tensor, v: Tensor, g: Tensor, is_finite: Tensor, betas: tuple[float, float], scalars: tuple[Tensor, ...]
) -> None:
    """Moments in place, and the change of the parameters in place of the gradient."""
    a, s, e = scalars
    _follow_where(is_finite, m, g, 1 - betas[0])
    _follow_where(is_finite, v, g.square_(), 1 - betas[1])
    torch.div(m, torch.sqrt(v, out=g).mul_(s).add_(e), out=g).mul_(-a)
    if not on_cpu(g):
        g.copy_(torch.where(is_finite, g, -0.0))  # the one number whose addition changes no bit


def _follow_where(is_finite: Tensor, value: Tensor, target: Tensor, weight: Tensor | float) -> None:
    """value <- value + weight (target - value) in place, where the step is finite; a CPU comes here only then."""
    if on_cpu(value):
        value.lerp_(target, weight)
    else:
        # A selection, not a product with 0: NaN times zero is NaN, and adding zero turns -0 into 0.
        torch.where(is_finite, value.lerp(target, weight), value, out=value)


def step_scalars(
    num_steps: Float[Tensor, ""], lr: Float[Tensor, ""], kind: str, betas: tuple[float, float], eps: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """The scalars (a, s, e), fp64, of the update p <- p - a m / (s sqrt(v) + e) at step t = num_steps >= 1.

    Adam: a = lr / (1 - beta1^t), s = 1 / sqrt(1 - beta2^t), e = eps (arXiv 1412.6980, Alg. 1).
    RAdam: a = lr rect sqrt(1 - beta2^t) / (1 - beta1^t), s = 1, e = eps once rho_t > 5; before that the variance is
    left out: a = lr / (1 - beta1^t), s = 0, e = 1. rho_inf = 2 / (1 - beta2) - 1,
    rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t),
    rect^2 = (rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t) (arXiv 1908.03265, Alg. 2).
    """
    beta1, beta2 = betas
    t = num_steps.clamp(min=1).double()  # fp32 loses the digits of 1 - beta2^t, and all of those of rho_t
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    a, one = lr.double() / correction1, torch.ones_like(t)
    if kind == "adam":
        return a, 1 / correction2.sqrt(), one * eps
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / correction2
    rectified = rho > RECTIFIED_ABOVE
    ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    a = a * torch.where(rectified, (ratio.clamp(min=0) * correction2).sqrt(), one)
    return a, rectified * one, torch.where(rectified, one * eps, one)


@torch.no_grad()
def follow_params(
    params: Sequence[Float[Tensor, "..."]],
    is_finite: Bool[Tensor, ""],
    averages: Sequence[Float[Tensor, " P"]],
    ema_betas: Float[Tensor, " K"] | None,
    copy_P: Float[Tensor, " P"] | None,
) -> None:
    """What follows the parameters where the step was finite: ema <- ema + (1 - beta_k) (p - ema); copy <- p."""
    if (averages or copy_P is not None) and not (on_cpu(is_finite) and not is_finite):
        param_P = torch.zeros_like(averages[0] if averages else copy_P, dtype=params[0].dtype)
        _follow(params, is_finite, averages, ema_betas, copy_P, flat_views(params, param_P), param_P)


def _follow(
    params: Sequence[Tensor],
    is_finite: Tensor,
    averages: Sequence[Tensor],
    ema_betas: Tensor | None,
    copy_P: Tensor | None,
    views: list[Tensor],
    param_P: Tensor,
) -> None:
    """``follow_params`` with memory for a flat copy of the parameters (``views`` are its parts)."""
    if not averages and copy_P is None:
        return
    copy_present(views, params)
    weights = [(1 - beta).to(param_P.dtype) for beta in (() if ema_betas is None else ema_betas.unbind())]
    for part in _parts(param_P):
        for average_P, weight in zip(averages, weights, strict=True):
            _follow_where(is_finite, average_P[part], param_P[part], weight)
    if copy_P is not None:
        torch.where(is_finite, param_P.to(copy_P.dtype), copy_P, out=copy_P)
