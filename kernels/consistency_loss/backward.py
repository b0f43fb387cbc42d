"""Triton kernel of the backward pass: the difference is computed again, which is cheaper than to store and to read it."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..runtime.elements import loop_format
from ..runtime.launch import Launch, ceil_div, next_power_of_2
from ..runtime.pinned import pinned
from .derivatives import Denoiser, Gradients, Target
from .difference import difference, distance_of, shared_arguments, slope_of


# One line per tensor.
# fmt: off
@triton.jit
def gradient_kernel(
    F_t_ptr, F_t_stride_n, F_t_ROW: tl.constexpr, F_t_COLUMN: tl.constexpr,
    x_t_ptr, x_t_stride_n, x_t_ROW: tl.constexpr, x_t_COLUMN: tl.constexpr,
    c_skip_t_ptr, c_out_t_ptr,
    clean_ptr, clean_stride_n, clean_ROW: tl.constexpr, clean_COLUMN: tl.constexpr,
    F_r_ptr, F_r_stride_n, F_r_ROW: tl.constexpr, F_r_COLUMN: tl.constexpr,
    x_r_ptr, x_r_stride_n, x_r_ROW: tl.constexpr, x_r_COLUMN: tl.constexpr,
    c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
    grad_ptr, grad_stride, weight_ptr, squares_ptr, grad_F_ptr, grad_x_ptr, grad_weight_ptr,
    SQUARED: tl.constexpr, C: tl.constexpr, C_SQUARED: tl.constexpr, ELEMENTS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):
    """dF = g w h(S) c_out v and dx = g w h(S) c_skip v of BLOCK elements; the first program of an image writes dw = g d(S)."""
    program = tl.program_id(0)
    n, split = (program // SPLITS).to(tl.int64), program % SPLITS
    grad, squares = tl.load(grad_ptr + n * grad_stride), tl.load(squares_ptr + n)
    if (grad_F_ptr is not None) or (grad_x_ptr is not None):
        element = split * BLOCK + tl.arange(0, BLOCK)
        mask = element < ELEMENTS
        v = difference(
            n, element, mask, COLUMNS,
            F_t_ptr, F_t_stride_n, F_t_ROW, F_t_COLUMN, x_t_ptr, x_t_stride_n, x_t_ROW, x_t_COLUMN,
            c_skip_t_ptr, c_out_t_ptr, clean_ptr, clean_stride_n, clean_ROW, clean_COLUMN,
            F_r_ptr, F_r_stride_n, F_r_ROW, F_r_COLUMN, x_r_ptr, x_r_stride_n, x_r_ROW, x_r_COLUMN,
            c_skip_r_ptr, c_out_r_ptr, boundary_ptr,
        )
        factor = grad * tl.load(weight_ptr + n) * slope_of(squares, SQUARED, C_SQUARED)
        offset = n * ELEMENTS + element
        if grad_F_ptr is not None:
            grad_F = factor * tl.load(c_out_t_ptr + n) * v
            tl.store(grad_F_ptr + offset, grad_F.to(grad_F_ptr.dtype.element_ty), mask=mask)
        if grad_x_ptr is not None:
            grad_x = factor * tl.load(c_skip_t_ptr + n) * v
            tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + n, grad * distance_of(squares, SQUARED, C, C_SQUARED), mask=split == 0)
# fmt: on


def backward_launches(
    grad_N: Float[Tensor, " N"],
    squares_N: Float[Tensor, " N"],
    student: Denoiser,
    target: Target,
    weight_N: Float[Tensor, " N"],
    distance: str,
    c: float,
    out: Gradients,
    arch: str,
) -> list[Launch]:
    """The launch that fills the gradients of ``out`` that are not None.

    Image gradients are dense in the order of F_t's memory, the gradient of the weight is fp32; the other tensors are as for
    the forward pass, and ``grad_N`` may be strided (the gradient of a mean has stride 0).
    """
    arguments, elements = shared_arguments(student, target, distance, c, loop_format(student.F))
    chosen = pinned("consistency_loss", "backward", arch, elements=elements)
    block = min(chosen["block"], next_power_of_2(elements))
    splits = max(1, ceil_div(elements, block)) if out.F_t is not None or out.x_t is not None else 1
    arguments |= {
        "grad_ptr": grad_N,
        "grad_stride": grad_N.stride(0),
        "weight_ptr": weight_N,
        "squares_ptr": squares_N,
        "grad_F_ptr": out.F_t,
        "grad_x_ptr": out.x_t,
        "grad_weight_ptr": out.weight_N,
        "SPLITS": splits,
        "BLOCK": block,
    }
    return [Launch(gradient_kernel, (len(squares_N) * splits,), arguments, chosen["num_warps"])]
