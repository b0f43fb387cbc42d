"""What one training step takes: time, memory peak, launches, and which kernels the time goes to."""

import time
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.baselines.contestants import Step
from fastcm.bench.timing import summarise
from fastcm.graphs import WARMUP_CALLS

WARM_UP = WARMUP_CALLS + 1  # the last one records a CUDA graph
MIN_STEPS, MAX_STEPS = 5, 100
TOP = 30
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


def measure_step(step: Step, images: int, device: torch.device, budget_s: float = 3.0) -> dict[str, Any]:
    """Images per second, milliseconds a step (median, quantiles), memory peak, launches and kernels of one step.

    The first steps, which compile, are apart. A step's time is that between the ends of two steps on the device.
    """
    start = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    _wait(device)
    warm_up_s = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    step()
    _wait(device)
    number = max(MIN_STEPS, min(MAX_STEPS, int(budget_s / (time.perf_counter() - start))))
    timing = summarise(_gpu_times(step, number) if device.type == "cuda" else _host_times(step, number))
    return {
        "images_per_s": images / (timing.median_us * 1e-6),
        "step_ms": {"median": timing.median_us / 1e3, "p20": timing.p20_us / 1e3, "p80": timing.p80_us / 1e3, "n": timing.n},
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "warm_up_s": warm_up_s,
        **count_kernels(step, device),
    }


def _gpu_times(step: Step, number: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) * 1e-3 for first, second in pairwise(marks)]


def _host_times(step: Step, number: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(number):
        step()
        marks.append(time.perf_counter())
    return [second - first for first, second in pairwise(marks)]


class Event(NamedTuple):
    """What ran on the device, from ``start_us`` for ``us`` microseconds; on a CPU an operator without those it calls."""

    name: str
    start_us: float
    us: float


def profile_step(step: Step, device: torch.device) -> tuple[list[Event], int]:
    """What one step runs on the device, copies included, and how often the host launches something."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        step()
        _wait(device)
    events = record.events()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = [
        Event(event.name, event.time_range.start, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
        if event.device_type == kind and not event.is_user_annotation
    ]
    return found, sum(event.name.startswith(LAUNCHES) for event in events)


def count_kernels(step: Step, device: torch.device) -> dict[str, Any]:
    """Launches by the host, kernels on the device, their summed time, and the kernels that take most of it.

    On a CPU, which launches nothing, operators stand for kernels.
    """
    events, launches = profile_step(step, device)
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        if not event.name.startswith(("Memcpy", "Memset")):
            counts[event.name] += 1
            seconds[event.name] += event.us * 1e-6
    top = [{"name": name[:160], "count": counts[name], "ms": value * 1e3} for name, value in seconds.most_common(TOP)]
    return {"launches": launches, "kernels": counts.total(), "kernel_ms": seconds.total() * 1e3, "top": top}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
