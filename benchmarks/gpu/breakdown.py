"""Where the time of a training step goes: its kernels by category, the gaps between them, and the least that each must cost."""

import re
from collections import defaultdict
from typing import Any

import torch

from benchmarks.baselines.contestants import Step
from benchmarks.measuring.step_time import Event, profile_step
from fastcm.bench.cases import cases
from fastcm.bench.costs import case_cost

CONVOLUTION, ATTENTION, NORM, LOSS, OPTIMIZER = "convolution", "attention", "norm", "noise and loss", "optimizer"
PRODUCT, COPY, ELEMENTWISE, UNKNOWN = "matrix product", "copy and fill", "elementwise and reduction", "unknown"

# Which kernel is what, by the name that the profiler gives it; the first rule that matches decides. Ours and Inductor's stand
# first: they are whole names, or begin with a word of their own, while words such as "conv" or "gemm" occur in names of all.
RULES: tuple[tuple[str, str], ...] = (
    # kernels/: the name of the function. Loss and optimizer share the name of a kernel of one program.
    (r"(forward|backward|reduce|jvp)_kernel", NORM),
    (r"(rows|online|image_backward|rows_query|rows_key|query_blocks|key_blocks|rows_jvp|online_jvp)_kernel", ATTENTION),
    (r"(gradient|loss|loss_jvp|add_noise)_kernel", LOSS),
    (r"(norm|finish|update)_kernel", OPTIMIZER),
    # Inductor: triton_<kind>_fused_<operators>; it splits a group norm into these.
    (r"triton_.*(group_norm|var_mean).*", NORM),
    (r"triton_.*softmax.*", ATTENTION),
    (r"triton_.*", ELEMENTWISE),
    (r"(Memcpy|Memset) .*", COPY),
    # Attention of PyTorch, cuDNN and xformers; a network of these has no other softmax.
    (r".*(flash|fmha|sdpa|softmax).*", ATTENTION),
    # cuDNN; its conversions of layout belong to the convolutions that need them.
    (r".*([fd]prop|dgrad|wgrad|conv(?!ert)|winograd|cudnn|nchwToNhwc|nhwcToNchw|fft2d).*", CONVOLUTION),
    # cuBLAS and CUTLASS.
    (r".*(gemm|gemv|nvjet|cutlass|cublas|splitKreduce).*", PRODUCT),
    # PyTorch's own.
    (r".*(RowwiseMoments|GroupNorm|ComputeFusedParams|ComputeInternalGradients|GammaBeta|group_norm).*", NORM),
    (r".*(multi_tensor_apply|FusedAdam).*", OPTIMIZER),
    (r".*(at::|at_cuda|elementwise|c10::).*", ELEMENTWISE),
)


def category(name: str) -> str:
    """What a kernel of this name does."""
    return next((kind for pattern, kind in RULES if re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL)), UNKNOWN)


def step_costs(shape_set: str, batch: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Bytes and operations of one ECT step by category, from the cost models: student forward and backward, teacher forward.

    Convolutions and matrix products are not in them: their floor is the convolutions' measured time.
    """
    passes = {
        NORM: (("group_norm", "fwd"), ("group_norm", "fwd"), ("group_norm", "bwd")),
        ATTENTION: (("attention", "fwd"), ("attention", "fwd"), ("attention", "bwd")),
        LOSS: (("add_noise", "fwd"), ("consistency_loss", "fwd"), ("consistency_loss", "bwd")),
    }
    found = {}
    for kind, parts in passes.items():
        chosen = [case for op, direction in parts for case in cases(op, shape_set, batch, dtype, (direction,))]
        found[kind] = _total([(case.calls, case_cost(case)) for case in chosen])
    optimizer = next(cases("optimizer", shape_set, batch, torch.float32, ("fwd",)))  # the trainer keeps no low-precision copy
    return found | {OPTIMIZER: _total([(1, case_cost(optimizer))])}


def _total(costs: list[tuple[int, Any]]) -> dict[str, int]:
    return {"bytes": sum(n * cost.bytes for n, cost in costs), "flops": sum(n * cost.flops for n, cost in costs)}


def split(events: list[Event]) -> dict[str, Any]:
    """Milliseconds and kernels of each category, and the names of what no rule knows."""
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"ms": 0.0, "kernels": 0})
    for event in events:
        entry = found[category(event.name)]
        entry["ms"] += event.us / 1e3
        entry["kernels"] += 1
    unknown = sorted({event.name[:160] for event in events if category(event.name) == UNKNOWN})
    return {"categories": dict(found), "unknown": unknown}


def busy_ms(events: list[Event]) -> float:
    """How long the device was at work: kernels that run side by side count once."""
    total, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start_us):
        total += max(event.start_us + event.us - max(event.start_us, end), 0.0)
        end = max(end, event.start_us + event.us)
    return total / 1e3


def break_down(step: Step, device: torch.device, shape_set: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels of one step by category, how long the device was at work, and the costs that the models know."""
    events, _ = profile_step(step, device)
    busy = busy_ms(events)
    return {**split(events), "busy_ms": busy, "shapes": shape_set, "costs": step_costs(shape_set, batch, dtype)}
