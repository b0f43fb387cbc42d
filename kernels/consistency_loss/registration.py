"""``fastcm::consistency_loss``, its backward and its JVP: what torch.compile sees, and the functions in front of them."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..runtime.checks import FLOATS, check_no_tangent, check_tensor
from ..runtime.elements import dense, evenly_spaced, loop_format
from ..runtime.fallback import triton_or_reference
from ..runtime.launch import run
from ..runtime.pinned import architecture
from . import derivatives
from .derivatives import Denoiser, Gradients, Tangents, Target
from .reference import check_options

FLOATS_64 = (*FLOATS, torch.float64)


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
    """Weighted distance of the student's denoised image to its target, one number per sample, in one pass over the images.

    loss = weight d(D_t - target), D_t = c_skip_t x_t + c_out_t F_t; the target carries no gradient: it is ``clean``
    where ``boundary_N`` or where there is no teacher, else D_r = c_skip_r x_r + c_out_r F_r.
    d(v) with S = sum of v^2 over all pixels: "squared" S (arXiv 2206.00364, Eq. 2), "l2" sqrt(S) (arXiv 2406.14548),
    "pseudo_huber" sqrt(S + c^2) - c (arXiv 2310.14189, section 3.3).

    The gradient of a distance at S = 0 is 0, its value 0. Rows of ``F_r`` and ``x_r`` under the boundary are never
    read, and nothing else is masked: a NaN anywhere else stays a NaN in the loss of its own sample.

    Arguments: images [N, C, H, W] of float dtypes, each of its own and in any memory; evenly spaced pixels are read in
    place. Scalings and ``weight_N`` [N] of any float dtype; ``boundary_N`` bool [N]. The loss is fp32. Where an argument
    is fp64, plain PyTorch computes all in fp64 on every device.
    Gradients exist for F_t, x_t and weight_N. Unlike the reference this raises ValueError for c_skip_t or c_out_t that
    require grad, and for forward-mode tangents (see ``forward_ad``). Also ValueError or TypeError, naming the argument, for
    a shape, dtype or device that does not fit, an unknown distance, a negative c or a teacher that is given only in part.
    """
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_arguments((F_t, x_t, c_skip_t, c_out_t), clean, weight_N, teacher, boundary_N, distance, c)
    for name, value in (("F_t", F_t), ("x_t", x_t), ("weight_N", weight_N)):
        check_no_tangent(name, value, "consistency_loss of forward_ad.py or consistency_loss_jvp")
    F_t, x_t, clean = (evenly_spaced(image) for image in (F_t, x_t, clean.detach()))
    if F_r is not None and x_r is not None:
        F_r, x_r = evenly_spaced(F_r.detach()), evenly_spaced(x_r.detach())
        c_skip_r, c_out_r = (None if value is None else value.detach() for value in (c_skip_r, c_out_r))
    target = (clean, weight_N, F_r, x_r, c_skip_r, c_out_r, boundary_N)
    loss_N, _ = _loss(F_t, x_t, c_skip_t, c_out_t, *target, distance, float(c))
    return loss_N


def consistency_loss_jvp(
    F_t: Float[Tensor, "N C H W"],
    x_t: Float[Tensor, "N C H W"],
    c_skip_t: Float[Tensor, " N"],
    c_out_t: Float[Tensor, " N"],
    clean: Float[Tensor, "N C H W"],
    weight_N: Float[Tensor, " N"],
    *,
    tF_t: Float[Tensor, "N C H W"] | None = None,
    tx_t: Float[Tensor, "N C H W"] | None = None,
    tweight_N: Float[Tensor, " N"] | None = None,
    F_r: Float[Tensor, "N C H W"] | None = None,
    x_r: Float[Tensor, "N C H W"] | None = None,
    c_skip_r: Float[Tensor, " N"] | None = None,
    c_out_r: Float[Tensor, " N"] | None = None,
    boundary_N: Bool[Tensor, " N"] | None = None,
    distance: str = "l2",
    c: float = 0.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(loss, its tangent) of ``consistency_loss`` for the tangents tF_t, tx_t and tweight_N (None means 0), in one pass.

    dL = w h(S) <v, c_out tF + c_skip tx> + tw d(S) with v = D_t - target and the slope h(S) = 2 d'(S), 0 at S = 0. The
    target and the scalings have no tangent, and no gradient flows back. Arguments and errors are those of
    ``consistency_loss``; a tangent has the shape of what it belongs to and any float dtype.
    """
    teacher = (F_r, x_r, c_skip_r, c_out_r)
    check_arguments((F_t, x_t, c_skip_t, c_out_t), clean, weight_N, teacher, boundary_N, distance, c)
    for name, value, like in (("tF_t", tF_t, F_t), ("tx_t", tx_t, F_t), ("tweight_N", tweight_N, weight_N)):
        if value is not None:
            check_tensor(name, value, shape=like.shape, dtypes=FLOATS_64, device=F_t.device)
    target = (clean, weight_N, *teacher, boundary_N)
    return _loss_jvp(tF_t, tx_t, tweight_N, F_t, x_t, c_skip_t, c_out_t, *target, distance, float(c))


def check_arguments(
    student: tuple[Shaped[Tensor, "..."], ...],
    clean: Shaped[Tensor, "..."],
    weight_N: Shaped[Tensor, "..."],
    teacher: tuple[Shaped[Tensor, "..."] | None, ...],
    boundary_N: Shaped[Tensor, "..."] | None,
    distance: str,
    c: float,
) -> None:
    """Raise ValueError or TypeError, naming the argument and its value, for what the loss cannot be computed from."""
    check_options(teacher, distance, c)
    F_t, x_t, c_skip_t, c_out_t = student
    if F_t.ndim != 4:
        raise ValueError(f"F_t has shape {tuple(F_t.shape)}, expected four axes (N, C, H, W)")
    F_r, x_r, c_skip_r, c_out_r = teacher
    images = {"F_t": F_t, "x_t": x_t, "clean": clean, "F_r": F_r, "x_r": x_r}
    vectors = {"c_skip_t": c_skip_t, "c_out_t": c_out_t, "weight_N": weight_N, "c_skip_r": c_skip_r, "c_out_r": c_out_r}
    for expected, values in ((tuple(F_t.shape), images), ((F_t.shape[0],), vectors)):
        for name, value in values.items():
            if value is not None:
                check_tensor(name, value, shape=expected, dtypes=FLOATS_64, device=F_t.device)
    if boundary_N is not None:
        check_tensor("boundary_N", boundary_N, shape=(F_t.shape[0],), dtypes=(torch.bool,), device=F_t.device)
    for name in ("c_skip_t", "c_out_t"):
        if vectors[name].requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, for which the kernel has no gradient: detach it or use the reference")


@torch.library.custom_op("fastcm::consistency_loss", mutates_args=())
def _loss(
    F_t: Tensor,
    x_t: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    clean: Tensor,
    weight: Tensor,
    F_r: Tensor | None,
    x_r: Tensor | None,
    c_skip_r: Tensor | None,
    c_out_r: Tensor | None,
    boundary: Tensor | None,
    distance: str,
    c: float,
) -> tuple[Tensor, Tensor]:
    parts = (F_t, x_t, c_skip_t, c_out_t, clean, weight, F_r, x_r, c_skip_r, c_out_r, boundary)

    def plain() -> tuple[Tensor, Tensor]:
        student, target, weight_N = _grouped(parts, lambda value: value)
        found = derivatives.forward(student, target, weight_N, distance, c)
        return tuple(value.to(_work_dtype(parts)) for value in found)

    def kernel() -> tuple[Tensor, Tensor]:
        from .forward import forward_launches

        out = tuple(_vector(parts) for _ in range(2))
        run(forward_launches(*_grouped(parts, _readable), distance, c, *out, architecture(F_t.device)), F_t.device)
        return out

    return _on_device(parts, kernel, plain)


@_loss.register_fake
def _(F_t: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    parts = (F_t, *others[:-2])
    return _vector(parts), _vector(parts)


@torch.library.custom_op("fastcm::consistency_loss_backward", mutates_args=())
def _loss_backward(
    grad: Tensor,
    squares: Tensor,
    F_t: Tensor,
    x_t: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    clean: Tensor,
    weight: Tensor,
    F_r: Tensor | None,
    x_r: Tensor | None,
    c_skip_r: Tensor | None,
    c_out_r: Tensor | None,
    boundary: Tensor | None,
    distance: str,
    c: float,
    needed: list[bool],
) -> list[Tensor]:
    parts = (F_t, x_t, c_skip_t, c_out_t, clean, weight, F_r, x_r, c_skip_r, c_out_r, boundary)

    def plain() -> list[Tensor]:
        found = derivatives.backward(grad, squares, *_grouped(parts, lambda value: value), distance, c, tuple(needed))
        images = [None if image is None else dense(image, loop_format(F_t)) for image in found[:2]]
        return [value for value in (*images, found.weight_N) if value is not None]

    def kernel() -> list[Tensor]:
        from .backward import backward_launches

        out = _gradients(parts, needed)
        # The kernel writes the gradient of the weight in fp32.
        filled = out._replace(weight_N=_vector(parts)) if needed[2] else out
        grouped = _grouped(parts, _readable)
        launches = backward_launches(grad, squares, *grouped, distance, c, filled, architecture(F_t.device))
        run(launches, F_t.device)
        if needed[2]:
            out = out._replace(weight_N=filled.weight_N.to(weight.dtype))
        return [value for value in out if value is not None]

    return _on_device((*parts, grad), kernel, plain)


@_loss_backward.register_fake
def _(grad: Tensor, squares: Tensor, F_t: Tensor, *others: Any) -> list[Tensor]:
    return [value for value in _gradients((F_t, *others[:-3]), others[-1]) if value is not None]


@torch.library.custom_op("fastcm::consistency_loss_jvp", mutates_args=())
def _loss_jvp(
    tF: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    F_t: Tensor,
    x_t: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    clean: Tensor,
    weight: Tensor,
    F_r: Tensor | None,
    x_r: Tensor | None,
    c_skip_r: Tensor | None,
    c_out_r: Tensor | None,
    boundary: Tensor | None,
    distance: str,
    c: float,
) -> tuple[Tensor, Tensor]:
    parts = (F_t, x_t, c_skip_t, c_out_t, clean, weight, F_r, x_r, c_skip_r, c_out_r, boundary)
    tangents = Tangents(tF, tx, tweight)
    everything = (*parts, *tangents)

    def plain() -> tuple[Tensor, Tensor]:
        found = derivatives.jvp(tangents, *_grouped(parts, lambda value: value), distance, c)
        return tuple(value.to(_work_dtype(everything)) for value in found)

    def kernel() -> tuple[Tensor, Tensor]:
        from .jvp import jvp_launches

        out = tuple(_vector(everything) for _ in range(2))
        moved = Tangents(*(None if value is None else _readable(value) for value in tangents))
        launches = jvp_launches(moved, *_grouped(parts, _readable), distance, c, *out, architecture(F_t.device))
        run(launches, F_t.device)
        return out

    return _on_device(everything, kernel, plain)


@_loss_jvp.register_fake
def _(tF: Tensor | None, tx: Tensor | None, tweight: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    everything = (*others[:-2], tF, tx, tweight)
    return _vector(everything), _vector(everything)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *parts, ctx.distance, ctx.c = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *parts)


def _differentiate(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    squares, *parts = ctx.saved_tensors
    places = (0, 1, 5)  # F_t, x_t, weight
    needed = [ctx.needs_input_grad[place] for place in places]
    found = iter(_loss_backward(grad_loss, squares, *parts, ctx.distance, ctx.c, needed))
    gradients: list[Tensor | None] = [None] * (len(parts) + 2)
    for place, is_needed in zip(places, needed, strict=True):
        gradients[place] = next(found) if is_needed else None
    return tuple(gradients)


_loss.register_autograd(_differentiate, setup_context=_setup_context)


def _on_device(parts: tuple[Tensor | None, ...], kernel: Callable[[], Any], plain: Callable[[], Any]) -> Any:
    if any(part is not None and part.dtype == torch.float64 for part in parts):
        return plain()
    return triton_or_reference("consistency_loss", parts[0].device, kernel, plain)


def _grouped(parts: tuple[Tensor | None, ...], prepare: Callable[[Tensor], Tensor]) -> tuple[Denoiser, Target, Tensor]:
    """The tensors of the op as the formulas group them."""
    F_t, x_t, c_skip_t, c_out_t, clean, weight, F_r, x_r, c_skip_r, c_out_r, boundary = (
        None if part is None else prepare(part) for part in parts
    )
    teacher = None if F_r is None else Denoiser(F_r, x_r, c_skip_r, c_out_r)
    return Denoiser(F_t, x_t, c_skip_t, c_out_t), Target(clean, teacher, boundary), weight


def _readable(part: Tensor) -> Tensor:
    """What a kernel can read: evenly spaced images, contiguous vectors, scalings in fp32."""
    if part.ndim == 4:
        return evenly_spaced(part)
    return (part if part.dtype == torch.bool else part.float()).contiguous()


def _work_dtype(parts: tuple[Tensor | None, ...]) -> torch.dtype:
    """fp32, or fp64 where a part other than the clean image is fp64."""
    relevant = [part for place, part in enumerate(parts) if part is not None and place != 4]
    return torch.float64 if any(part.dtype == torch.float64 for part in relevant) else torch.float32


def _vector(parts: tuple[Tensor | None, ...]) -> Tensor:
    return torch.empty(parts[0].shape[0], dtype=_work_dtype(parts), device=parts[0].device)


def _gradients(parts: tuple[Tensor | None, ...], needed: list[bool]) -> Gradients:
    """Memory for the gradients that are needed: images dense in the order of F_t, all in the dtype of what they belong to."""
    F_t, x_t, weight = parts[0], parts[1], parts[5]
    options = {"device": F_t.device, "memory_format": loop_format(F_t)}
    images = (torch.empty(F_t.shape, dtype=each.dtype, **options) for each in (F_t, x_t))
    grad_F, grad_x = (image if wanted else None for image, wanted in zip(images, needed[:2], strict=True))
    return Gradients(grad_F, grad_x, torch.empty(len(weight), dtype=weight.dtype, device=F_t.device) if needed[2] else None)
