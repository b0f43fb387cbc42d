"""The optimizer step as three Triton launches over chunks of all parameters at once.

1. ``norm``: the sum of squares of the unscaled gradients of each chunk, one writer each.
2. ``finish``: one program adds the sums in a fixed order, decides whether the step is finite, and computes its scalars.
3. ``update``: Adam or RAdam, all averages and the weight copy in one read and one write of everything; a step that is
   not finite returns before it writes. The step count changes here too: a failure to launch leaves no half-made step.

Parameters, gradients and averages are separate tensors whose addresses are in a table, so nothing is gathered. A chunk is
a row (tensor, first element, number of elements, place in the flat tensors); its whole blocks go through 16-byte loads,
the rest (and tensors at odd addresses, such as slices of a gradient bucket) through masked ones.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..runtime.launch import Launch
from ..runtime.pinned import pinned
from .reference import RECTIFIED_ABOVE

RECTIFIED = tl.constexpr(RECTIFIED_ABOVE)
INFINITY = tl.constexpr(float("inf"))
STEP_BITS = tl.constexpr(24)  # the step count is an fp32 number, exact up to 2^24
GRAD_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Scratch(NamedTuple):
    """What the launches hand on to each other: sums of squares by chunk, and (a, s, e, t) of the step."""

    sums_C: Float32[Tensor, " C"]
    scalars: Float32[Tensor, "4"]


@triton.jit
def chunk_row(chunks_ptr, chunk):
    """Tensor, first element in it, number of elements, place in the flat tensors."""
    row_ptr = chunks_ptr + 4 * chunk.to(tl.int64)
    return tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2).to(tl.int32), tl.load(row_ptr + 3)


@triton.jit
def element_ptr(address, TYPE: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Pointer to an element of the tensor at ``address``; ALIGNED: it is known to be a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(TYPE)) + first
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def flat_ptr(base_ptr, place, ALIGNED: tl.constexpr):
    """Pointer to an element of a flat tensor."""
    return tl.multiple_of(base_ptr + place, 16) if ALIGNED else base_ptr + place


@triton.jit
def inverse_scale(loss_scale_ptr):
    """1 / loss_scale; 1 without one."""
    if loss_scale_ptr is None:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(loss_scale_ptr))


@triton.jit(do_not_specialize=["num_tensors"])
def norm_kernel(sums_ptr, chunks_ptr, addresses_ptr, loss_scale_ptr, num_tensors, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of the unscaled gradient of one chunk; 0 where there is no gradient (address 0)."""
    chunk = tl.program_id(0)
    tensor, start, count, _ = chunk_row(chunks_ptr, chunk)
    address = tl.load(addresses_ptr + num_tensors + tensor)
    count = tl.where(address == 0, 0, count)
    whole = tl.where(address % 16 == 0, count // BLOCK * BLOCK, 0)
    unscale = inverse_scale(loss_scale_ptr)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, whole, BLOCK):
        grad_ptr = element_ptr(address, GRAD, start + begin, True)
        g = tl.load(grad_ptr + tl.arange(0, BLOCK)).to(tl.float32) * unscale
        squares += g * g
    total = tl.sum(squares)
    for begin in range(whole, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        g = tl.load(element_ptr(address, GRAD, start, False) + i, mask=i < count, other=0.0).to(tl.float32) * unscale
        total += tl.sum(g * g)
    tl.store(sums_ptr + chunk, total)


@triton.jit
def power(BASE: tl.constexpr, exponent):
    """BASE^exponent in fp64 by repeated squaring; exponent: int32 below 2^STEP_BITS."""
    square = tl.full((), BASE, tl.float64)
    result = tl.full((), 1.0, tl.float64)
    for _ in tl.static_range(STEP_BITS):
        result = tl.where(exponent % 2 == 1, result * square, result)
        square *= square
        exponent = exponent // 2
    return result


@triton.jit(do_not_specialize=["num_chunks"])
def finish_kernel(
    finite_ptr,
    norm_ptr,
    scalars_ptr,
    sums_ptr,
    num_steps_ptr,
    lr_ptr,
    num_chunks,
    RADAM: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm, finite, and the scalars (a, s, e, t) of ``reference.step_scalars``; one program.

    Its few scalars are fp64: rho_t is a difference of numbers near 2 / (1 - beta2) whose first digits cancel. In fp32 rect is
    off by 0.4 % at t = 6 with beta2 = 0.999.
    """
    offset = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, num_chunks, BLOCK):
        squares += tl.load(sums_ptr + begin + offset, mask=begin + offset < num_chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(squares))
    finite = (norm < INFINITY).to(tl.float32)  # NaN is not below it either
    steps = tl.load(num_steps_ptr) + finite
    count = tl.maximum(steps, 1.0).to(tl.int32)
    power2 = power(BETA2, count)
    correction2 = 1.0 - power2
    a = tl.load(lr_ptr).to(tl.float64) / (1.0 - power(BETA1, count))
    s = 1.0 / tl.sqrt(correction2)
    e = tl.full((), EPS, tl.float32)
    if RADAM:
        RHO_INF: tl.constexpr = 2 / (1 - BETA2) - 1
        rho = RHO_INF - 2.0 * count.to(tl.float64) * power2 / correction2
        rectified = rho > RECTIFIED
        ratio = (rho - 4.0) * (rho - 2.0) * RHO_INF / ((RHO_INF - 4.0) * (RHO_INF - 2.0) * rho)
        a = tl.where(rectified, a * tl.sqrt(tl.where(rectified, ratio * correction2, 1.0)), a)
        s = rectified.to(tl.float64)
        e = tl.where(rectified, e, 1.0)
    tl.store(finite_ptr, finite)
    tl.store(norm_ptr, norm)
    tl.store(scalars_ptr, a.to(tl.float32))
    tl.store(scalars_ptr + 1, s.to(tl.float32))
    tl.store(scalars_ptr + 2, e)
    tl.store(scalars_ptr + 3, steps)


@triton.jit
def lerp(start, end, weight):
    """start + weight (end - start), exact at both ends, as torch.lerp computes it."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * (1.0 - weight))


@triton.jit
def update_blocks(
    first,
    last,
    start,
    place,
    param_address,
    grad_address,
    averages_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    ema_betas_ptr,
    unscale,
    a,
    s,
    e,
    GRAD: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    NUM_AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the elements [first, last) of a chunk: whole blocks at aligned addresses, or masked ones at any."""
    for begin in range(first, last, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        mask = None if ALIGNED else i < last
        grad_mask = None if ALIGNED else (i < last) & (grad_address != 0)
        zero = None if ALIGNED else 0.0
        param_ptr = element_ptr(param_address, tl.float32, start, ALIGNED) + i
        m_ptr, v_ptr = flat_ptr(exp_avg_ptr, place, ALIGNED) + i, flat_ptr(exp_avg_sq_ptr, place, ALIGNED) + i
        g = tl.load(element_ptr(grad_address, GRAD, start, ALIGNED) + i, mask=grad_mask, other=zero).to(tl.float32) * unscale
        p, m, v = tl.load(param_ptr, mask=mask), tl.load(m_ptr, mask=mask), tl.load(v_ptr, mask=mask)
        m = lerp(m, g, tl.full((), 1 - BETA1, tl.float32))
        v = lerp(v, g * g, tl.full((), 1 - BETA2, tl.float32))
        p -= a * tl.div_rn(m, tl.sqrt_rn(v) * s + e)
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)
        tl.store(param_ptr, p, mask=mask)
        if copy_ptr is not None:
            tl.store(flat_ptr(copy_ptr, place, ALIGNED) + i, p.to(copy_ptr.dtype.element_ty), mask=mask)
        for k in tl.static_range(NUM_AVERAGES):
            average_ptr = element_ptr(tl.load(averages_ptr + k), tl.float32, place, ALIGNED) + i
            average = tl.load(average_ptr, mask=mask)
            tl.store(average_ptr, lerp(average, p, 1.0 - tl.load(ema_betas_ptr + k)), mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def update_kernel(
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    num_steps_ptr,
    chunks_ptr,
    addresses_ptr,
    finite_ptr,
    scalars_ptr,
    loss_scale_ptr,
    ema_betas_ptr,
    num_tensors,
    GRAD: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    NUM_AVERAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moments, parameters, averages and copy of one chunk; the first program also writes the step count."""
    if tl.load(finite_ptr) == 0:
        return
    if tl.program_id(0) == 0:
        tl.store(num_steps_ptr, tl.load(scalars_ptr + 3))
    # From the last chunk to the first: the gradients that the norm read last are still in the cache.
    tensor, start, count, place = chunk_row(chunks_ptr, tl.num_programs(0) - 1 - tl.program_id(0))
    param_address = tl.load(addresses_ptr + tensor)
    grad_address = tl.load(addresses_ptr + num_tensors + tensor)
    averages_ptr = addresses_ptr + 2 * num_tensors
    a, s, e = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    unscale = inverse_scale(loss_scale_ptr)
    aligned = (param_address % 16 == 0) & (grad_address % 16 == 0) & (grad_address != 0)
    whole = tl.where(aligned, count // BLOCK * BLOCK, 0)
    update_blocks(0, whole, start, place, param_address, grad_address, averages_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr,
                  ema_betas_ptr, unscale, a, s, e, GRAD, BETA1, BETA2, NUM_AVERAGES, BLOCK, True)  # fmt: skip
    update_blocks(whole, count, start, place, param_address, grad_address, averages_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr,
                  ema_betas_ptr, unscale, a, s, e, GRAD, BETA1, BETA2, NUM_AVERAGES, BLOCK, False)  # fmt: skip


def step_launches(
    finite: Float32[Tensor, ""],
    norm: Float32[Tensor, ""],
    scratch: Scratch,
    chunks_C4: Int64[Tensor, "C 4"],
    addresses: Int64[Tensor, " A"],
    exp_avg_P: Float32[Tensor, " P"],
    exp_avg_sq_P: Float32[Tensor, " P"],
    num_steps: Float32[Tensor, ""],
    lr: Float32[Tensor, ""],
    *,
    grad_dtype: torch.dtype,
    num_averages: int,
    kind: str,
    betas: tuple[float, float],
    eps: float,
    loss_scale: Float32[Tensor, ""] | None,
    ema_betas: Float32[Tensor, " K"] | None,
    copy_P: Float[Tensor, " P"] | None,
    arch: str,
) -> list[Launch]:
    """The three launches; addresses: T parameters, T gradients (0 where there is none), K averages (runtime memory)."""
    num_chunks, facts = chunks_C4.shape[0], {"elements": exp_avg_P.numel(), "averages": num_averages}
    num_tensors = (addresses.numel() - num_averages) // 2
    tables = {"chunks_ptr": chunks_C4, "addresses_ptr": addresses, "loss_scale_ptr": loss_scale, "num_tensors": num_tensors}
    rates = {"BETA1": betas[0], "BETA2": betas[1]}
    grad = {"GRAD": GRAD_TYPES[grad_dtype]}

    def launch(kernel: triton.JITFunction, direction: str, grid: int, **arguments: object) -> Launch:
        tuned = pinned("optimizer", direction, arch, **facts)
        return Launch(kernel, (grid,), {**arguments, "BLOCK": tuned["block"]}, num_warps=tuned["num_warps"])

    results = {"finite_ptr": finite, "scalars_ptr": scratch.scalars, "num_steps_ptr": num_steps}
    state = {"exp_avg_ptr": exp_avg_P, "exp_avg_sq_ptr": exp_avg_sq_P, "copy_ptr": copy_P, "ema_betas_ptr": ema_betas}
    scalars = {"lr_ptr": lr, "norm_ptr": norm, "num_chunks": num_chunks, "RADAM": kind == "radam", "EPS": eps}
    return [
        launch(norm_kernel, "norm", num_chunks, sums_ptr=scratch.sums_C, **tables, **grad),
        launch(finish_kernel, "finish", 1, sums_ptr=scratch.sums_C, **results, **scalars, **rates),
        launch(update_kernel, "update", num_chunks, **state, **tables, **results, **grad, **rates, NUM_AVERAGES=num_averages),
    ]
