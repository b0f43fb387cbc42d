"""The optimizer step with the multi-tensor kernels of NVIDIA apex, where they are installed: Adam only.

apex comes from its repository, built with its CUDA extensions; the package of that name on PyPI is another project.
Written against ``amp_C.multi_tensor_unscale_l2norm`` and ``amp_C.multi_tensor_adam_capturable`` of NVIDIA/apex 6424da3.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..runtime.fallback import KernelUnavailableError
from .layout import flat_views, same_order
from .reference import follow_params

CHUNK = 2048 * 32  # apex's own
L2_MODE, BIAS_CORRECTION, NO_DECAY = 0, 1, 0.0


def apex_unavailable(kind: str) -> str | None:
    """Why apex cannot do this step, in words; None where it can."""
    if kind != "adam":
        return f"NVIDIA apex has no {kind}, only adam"
    if find_spec("amp_C") is None:
        return "NVIDIA apex is not installed with its CUDA extensions (module amp_C; build it from github.com/NVIDIA/apex)"
    return None


@torch.no_grad()
def optimizer_step_apex(
    params: Sequence[Float32[Tensor, "..."]],
    grads: Sequence[Float[Tensor, "..."] | None],
    exp_avg_P: Float32[Tensor, " P"],
    exp_avg_sq_P: Float32[Tensor, " P"],
    num_steps: Float32[Tensor, ""],
    lr: Float32[Tensor, ""],
    *,
    kind: str,
    betas: tuple[float, float],
    eps: float,
    loss_scale: Float32[Tensor, ""] | None = None,
    averages: Sequence[Float32[Tensor, " P"]] = (),
    ema_betas: Float32[Tensor, " K"] | None = None,
    copy_P: Float[Tensor, " P"] | None = None,
) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
    """Apply gradients in place: (finite, norm); arguments and results are those of ``reference.optimizer_step``.

    fp32 gradients are overwritten with their unscaled values. apex computes beta^t in fp32, so the first steps differ
    from the reference by up to 1e-4 relative. Raises KernelUnavailableError with the reason where apex cannot do it.
    """
    reason = apex_unavailable(kind)
    if reason is not None:
        raise KernelUnavailableError(f"optimizer_step: {reason}")
    apex = import_module("amp_C")
    inverse = torch.ones_like(lr) if loss_scale is None else loss_scale.reciprocal()
    lists = [
        _lines(tensors)
        for tensors in (_dense(params, grads), params, flat_views(params, exp_avg_P), flat_views(params, exp_avg_sq_P))
    ]
    skip = torch.zeros(1, dtype=torch.int32, device=lr.device)
    norm = apex.multi_tensor_unscale_l2norm(CHUNK, skip, lists[:1], inverse, False)[0][0]
    is_finite = norm.isfinite()
    num_steps += is_finite
    skip.copy_(~is_finite)
    step = num_steps.int()
    apex.multi_tensor_adam_capturable(CHUNK, skip, lists, lr, *betas, eps, step, L2_MODE, BIAS_CORRECTION, NO_DECAY, inverse)
    follow_params(params, is_finite, averages, ema_betas, copy_P)
    return is_finite.float(), norm


def _dense(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the dtype and memory order of their parameters, zeros where there are none."""

    def dense(p: Tensor, grad: Tensor | None) -> Tensor:
        if grad is None:
            return torch.zeros_like(p)
        return grad if grad.dtype == p.dtype and same_order(p, grad) else torch.empty_like(p).copy_(grad)

    return [dense(p, grad) for p, grad in zip(params, grads, strict=True)]


def _lines(tensors: Sequence[Tensor]) -> list[Tensor]:
    # apex knows contiguous and channels_last tensors only; as lines all memory orders are alike.
    return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors if tensor.numel()]
