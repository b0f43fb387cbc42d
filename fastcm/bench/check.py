"""Is the answer right? Every result against the fp64 reference, before any speed of it is printed."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastcm.bench.backends import Backend, prepare, reference, with_sdpa
from fastcm.bench.cases import Case, Problem, in_fp64, sliced

ORACLE_CHUNK = 16  # images at a time: double precision of a whole batch of attention weights would not fit


class Tolerance(NamedTuple):
    """``norm`` bounds ||out - ref|| / ||ref||; ``element`` bounds |out - ref| / (rms(ref) + |ref|) of every element."""

    norm: float
    element: float


# A product with 16-bit operands has 1e-3 to 1e-2 of error in bf16, an eighth of that in fp16; fp32 must not be TF32 (3e-4).
TOLERANCES = {
    torch.float32: Tolerance(2e-5, 1e-3),
    torch.bfloat16: Tolerance(1e-2, 0.1),
    torch.float16: Tolerance(2e-3, 0.02),
}


class Verdict(NamedTuple):
    """The worst errors over all results of a call, and what is wrong (None: nothing)."""

    relative_error: float
    max_error: float
    problem: str | None


def oracle(case: Case, problem: Problem) -> list[Tensor]:
    """The results of one pass in double precision, from the same numbers, a few images at a time."""
    # PyTorch's fused attention kernels have no double precision on a GPU and no forward mode anywhere.
    run = partial(with_sdpa, SDPBackend.MATH) if case.op == "attention" else reference(case.op)
    truth = Backend("fp64", run)
    parts = [slice(start, start + ORACLE_CHUNK) for start in range(0, max(case.batch, 1), ORACLE_CHUNK)]
    results = []
    for part in parts:
        wide = in_fp64(sliced(problem, part))
        results.append([value.detach() for value in prepare(truth, wide, case.direction)()])
    shared = [case.direction == "bwd" and name in problem.shared for name in problem.differentiable]
    columns = list(zip(*results, strict=True))
    shared += [False] * (len(columns) - len(shared))
    return [sum(column) if sums else torch.cat(column) for column, sums in zip(columns, shared, strict=False)]


def verdict(results: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> Verdict:
    """Compare results with their truth; a NaN, a wrong shape or a missing result is a problem too."""
    if len(results) != len(truth):
        return Verdict(math.nan, math.nan, f"{len(results)} results instead of {len(truth)}")
    errors = [_errors(result, true) for result, true in zip(results, truth, strict=True)]
    relative, element, absolute = (max(column, key=_nan_last) for column in zip(*errors, strict=True))
    limit, wrong = TOLERANCES[dtype], None
    if not relative <= limit.norm:
        wrong = f"relative error {relative:.2e} is above {limit.norm:.0e}"
    elif not element <= limit.element:
        wrong = f"an element is off by {element:.2e} of its size, above {limit.element:.0e}"
    return Verdict(relative, absolute, wrong)


def _errors(result: Tensor, true: Tensor) -> tuple[float, float, float]:
    if result.shape != true.shape:
        return math.nan, math.nan, math.nan
    difference, norm = (result.double() - true).abs(), true.norm()
    rms = norm / math.sqrt(max(true.numel(), 1))
    # A truth of zero is met exactly or not at all.
    relative = torch.where(norm > 0, difference.norm() / norm, difference.norm())
    element = torch.where(norm > 0, difference / (rms + true.abs()), difference).max() if true.numel() else difference.sum()
    return relative.item(), element.item(), (difference.max() if true.numel() else difference.sum()).item()


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def poison(num_bytes: int, device: torch.device) -> None:
    """Leave NaN in memory that the next call is likely to be given, so that what it does not write shows."""
    torch.full((max(num_bytes // 4, 1),), math.nan, device=device)
