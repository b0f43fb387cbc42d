"""The optimizer step as a PyTorch operator: Triton where it runs, the reference elsewhere."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..runtime.checks import check_tensor
from ..runtime.fallback import triton_or_reference
from ..runtime.launch import run
from ..runtime.pinned import architecture, pinned
from . import reference
from .layout import flat_offsets, is_dense, same_order

MUTATED = ("params", "exp_avg_P", "exp_avg_sq_P", "num_steps", "averages", "copy_P")
LOW_PRECISION = (torch.bfloat16, torch.float16)


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
    """Apply gradients in place: (finite, norm). Formulas, arguments and results are those of ``reference.optimizer_step``.

    The state is fp32; gradients may be bf16 or fp16 and in any memory (one whose elements lie in another order than
    its parameter's is copied first). What varies from step to step is a tensor, so a CUDA graph can hold the call once
    it has run outside of one. Raises ValueError or TypeError naming the argument.
    """
    _check_options(kind, betas, averages, ema_betas)
    _check_state(params, exp_avg_P, exp_avg_sq_P, num_steps, averages, copy_P)
    _check_scalars(params[0].device, lr, loss_scale, ema_betas)
    _check_grads(params, grads)
    return _optimizer_step(
        params, grads, exp_avg_P, exp_avg_sq_P, num_steps, lr, loss_scale, averages, ema_betas, copy_P, kind, *betas, eps
    )  # fmt: skip


@torch.library.custom_op("fastcm::optimizer_step", mutates_args=MUTATED)
def _optimizer_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    num_steps: Tensor,
    lr: Tensor,
    loss_scale: Tensor | None,
    averages: Sequence[Tensor],
    ema_betas: Tensor | None,
    copy_P: Tensor | None,
    kind: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    state = (exp_avg_P, exp_avg_sq_P, num_steps, lr)
    rest = {"loss_scale": loss_scale, "ema_betas": ema_betas, "copy_P": copy_P}
    options = {"kind": kind, "betas": (beta1, beta2), "eps": eps, **rest}
    return triton_or_reference(
        f"{kind}_step",
        exp_avg_P.device,
        lambda: _fused(params, grads, *state, averages, **options),
        lambda: reference.optimizer_step(params, grads, *state, averages=averages, **options),
    )


@_optimizer_step.register_fake
def _fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    num_steps: Tensor,
    lr: Tensor,
    loss_scale: Tensor | None,
    averages: Sequence[Tensor],
    ema_betas: Tensor | None,
    copy_P: Tensor | None,
    kind: str,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return exp_avg_P.new_empty(()), exp_avg_P.new_empty(())


def _fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    num_steps: Tensor,
    lr: Tensor,
    averages: Sequence[Tensor],
    **options: object,
) -> tuple[Tensor, Tensor]:
    from .fused import Scratch, step_launches
    from .tables import address_table, chunk_table

    device = exp_avg_P.device
    arch, sizes = architecture(device), tuple(p.numel() for p in params)
    chunks_C4 = chunk_table(sizes, pinned("optimizer", "chunks", arch, elements=exp_avg_P.numel())["chunk"], device)
    flats = {"exp_avg_P": exp_avg_P, "exp_avg_sq_P": exp_avg_sq_P, "copy_P": options["copy_P"]}
    for name, flat_P in (flats | {f"averages[{k}]": average_P for k, average_P in enumerate(averages)}).items():
        if flat_P is not None and flat_P.data_ptr() % 16:
            raise ValueError(f"{name} begins at address {flat_P.data_ptr()}, expected a multiple of 16")
    grads, grad_dtype = _readable(params, grads)
    finite, norm = torch.empty((), device=device), torch.empty((), device=device)
    scratch = Scratch(torch.empty(len(chunks_C4), device=device), torch.empty(4, device=device))
    launches = step_launches(
        finite, norm, scratch, chunks_C4, address_table([*params, *grads, *averages], device),
        exp_avg_P, exp_avg_sq_P, num_steps, lr, grad_dtype=grad_dtype, num_averages=len(averages), arch=arch, **options,
    )  # fmt: skip
    run(launches, device)
    return finite, norm


def _readable(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], torch.dtype]:
    """The gradients in one dtype and in the memory order of their parameters, copied only where they are not."""
    dtypes = {grad.dtype for grad in grads if grad is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def readable(p: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is None or (grad.dtype == dtype and same_order(p, grad)):
            return grad
        return torch.empty_like(p, dtype=dtype).copy_(grad)

    return [readable(p, grad) for p, grad in zip(params, grads, strict=True)], dtype


def _check_options(kind: str, betas: tuple[float, float], averages: Sequence[Tensor], ema_betas: Tensor | None) -> None:
    """Raise ValueError for an unknown kind, a beta outside [0, 1), or averages without their betas."""
    if kind not in reference.KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(reference.KINDS)}")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}, expected 0 <= beta < 1")
    num_betas = 0 if ema_betas is None else len(ema_betas)
    if num_betas != len(averages):
        raise ValueError(f"ema_betas has {num_betas} values for {len(averages)} averages, expected one each")


def _check_state(
    params: Sequence[Tensor],
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    num_steps: Tensor,
    averages: Sequence[Tensor],
    copy_P: Tensor | None,
) -> None:
    """Raise ValueError or TypeError where the state is not flat fp32 tensors of one size on the device of the parameters."""
    if not params:
        raise ValueError("params is empty; the step needs at least one parameter")
    device = params[0].device
    for i, p in enumerate(params):
        if p.dtype != torch.float32 or p.device != device:
            check_tensor(f"params[{i}]", p, dtypes=(torch.float32,), device=device)
        if not p.is_contiguous() and not is_dense(p):
            raise ValueError(f"params[{i}] has strides {p.stride()} for shape {tuple(p.shape)}; expected dense memory")
    shape = (flat_offsets([p.numel() for p in params])[1],)
    flats = {"exp_avg_P": exp_avg_P, "exp_avg_sq_P": exp_avg_sq_P}
    flats |= {f"averages[{k}]": average_P for k, average_P in enumerate(averages)}
    for name, flat_P in flats.items():
        check_tensor(name, flat_P, shape=shape, dtypes=(torch.float32,), device=device)
    if copy_P is not None:
        flats["copy_P"] = copy_P
        check_tensor("copy_P", copy_P, shape=shape, dtypes=LOW_PRECISION, device=device)
    for name, flat_P in flats.items():
        if not flat_P.is_contiguous():
            raise ValueError(f"{name} has stride {flat_P.stride(0)}, expected 1")
    check_tensor("num_steps", num_steps, shape=(), dtypes=(torch.float32,), device=device)


def _check_scalars(
    device: torch.device,
    lr: Tensor,
    loss_scale: Tensor | None,
    ema_betas: Tensor | None,
) -> None:
    """Raise ValueError or TypeError where a scalar of the step is not fp32 on the device of the parameters."""
    check_tensor("lr", lr, shape=(), dtypes=(torch.float32,), device=device)
    if loss_scale is not None:
        check_tensor("loss_scale", loss_scale, shape=(), dtypes=(torch.float32,), device=device)
    if ema_betas is not None:
        check_tensor("ema_betas", ema_betas, dtypes=(torch.float32,), device=device)


def _check_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Raise ValueError or TypeError where gradients do not fit their parameters."""
    if len(grads) != len(params):
        raise ValueError(f"grads has {len(grads)} entries for {len(params)} params, expected one each (None: no gradient)")
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None:
            check_tensor(f"grads[{i}]", grad, shape=p.shape, device=p.device)
