"""How long a call takes: on the device itself by replaying a CUDA graph with cold caches, and as an eager call.

Each measurement rotates through several sets of inputs and outputs that together exceed the L2 cache, so that nothing is
read from it that a training step would find in memory.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

Thunk = Callable[[], Any]

MIN_SAMPLES, MAX_SAMPLES = 10, 500
MIN_SETS, MAX_SETS = 2, 256
L2_MARGIN = 3  # the sets together are this many times the cache


class Timing(NamedTuple):
    """Quantiles of the time of one call in microseconds, over ``n`` measurements."""

    median_us: float
    p20_us: float
    p80_us: float
    n: int


def summarise(seconds: Sequence[float]) -> Timing:
    """Median, 20 % and 80 % quantile."""
    values = torch.tensor(seconds, dtype=torch.float64)
    p20, median, p80 = (torch.quantile(values, share).item() for share in (0.2, 0.5, 0.8))
    return Timing(median * 1e6, p20 * 1e6, p80 * 1e6, len(seconds))


def num_sets(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of ``set_bytes`` of inputs and outputs to rotate through."""
    return max(MIN_SETS, min(MAX_SETS, -(-L2_MARGIN * l2_bytes // max(set_bytes, 1))))


def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache of a GPU; 0 for a CPU, whose times are no kernel times anyway."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


@contextmanager
def measuring_stream(device: torch.device) -> Iterator[None]:
    """A side stream of a GPU: a backward pass runs on the stream of its forward, and a graph is captured off the default."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def time_graph(thunks: Sequence[Thunk], budget_s: float) -> Timing:
    """Device time of one call with cold caches: all ``thunks`` captured as one CUDA graph, its replays timed by events.

    Must run inside ``measuring_stream``, where the thunks were prepared.
    """
    _warm_up(thunks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [thunk() for thunk in thunks]  # alive together, so each call writes to memory of its own
    replays = [graph.replay] * _num_samples(graph.replay, budget_s)
    seconds = [duration / len(thunks) for duration in _event_times(replays)]
    del kept
    return summarise(seconds)


def time_eager(thunks: Sequence[Thunk], budget_s: float) -> Timing:
    """Time of one eager call between two events: the kernels, and what the CPU takes to launch them where that is more."""
    _warm_up(thunks)
    number = _num_samples(thunks[0], budget_s)
    return summarise(_event_times([thunks[i % len(thunks)] for i in range(number)]))


def time_host(thunks: Sequence[Thunk], budget_s: float, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Time of one call by the host's clock, for work that is done when the call returns."""
    thunks[0]()
    seconds: list[float] = []
    while len(seconds) < MIN_SAMPLES or (sum(seconds) < budget_s and len(seconds) < MAX_SAMPLES):
        start = clock()
        thunks[len(seconds) % len(thunks)]()
        seconds.append(clock() - start)
    return summarise(seconds)


def _warm_up(thunks: Sequence[Thunk]) -> None:
    for _ in range(2):
        for thunk in thunks:
            thunk()
    torch.cuda.synchronize()


def _num_samples(thunk: Thunk, budget_s: float) -> int:
    (once,) = _event_times([thunk])
    return max(MIN_SAMPLES, min(MAX_SAMPLES, int(budget_s / max(once, 1e-9))))


def _event_times(thunks: Sequence[Thunk]) -> list[float]:
    """Seconds of each call, queued back to back."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in thunks]
    for (start, end), thunk in zip(pairs, thunks, strict=True):
        start.record()
        thunk()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]
