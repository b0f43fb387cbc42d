"""Functions replayed as CUDA graphs: all kernels of a call, however many, cost the host one launch.

A function is recorded with its arguments in memory of their own; every later call writes them there and repeats the recorded
kernels at the recorded addresses. So what a call reads besides its arguments must be state that stays where it is and is
changed in place (parameters, moments, averages, meters), and what varies from call to call must be a tensor among the
arguments: any other value is a constant of the recording, and another one is another recording.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Calls with new constants or shapes before they are recorded: kernels are compiled and loaded, libraries make their workspaces,
# none of which a recording may do.
WARMUP_CALLS = 3
# More than this and something that varies is not a tensor.
MAX_RECORDINGS = 64

Replay = Callable[[], None]


class Recorder(Protocol):
    """What can record the work of a call on a device."""

    def run(self, call: Callable[[], Any]) -> Any:
        """The result of the call, which does its work now and in the way that it will be recorded."""
        ...

    def record(self, call: Callable[[], Any]) -> tuple[Any, Replay]:
        """The memory of the result, and what fills it; the work of this call itself is recorded and not done."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, because no two of them run at once and none needs what another left."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], Any]) -> Any:
        """Run on the stream that records: autograd and the libraries remember the stream they were first used on."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Any]) -> tuple[Any, Replay]:
        """Capture a CUDA graph; other threads, such as those of a loader, may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = call()
        return result, graph.replay


class Recording(NamedTuple):
    """Where a recorded call reads its arguments and leaves its result, and what repeats it."""

    arguments: list[Tensor]
    result: Any
    replay: Replay


class Graphed:
    """``function``, recorded at its fourth call with the same constants and shapes, and replayed from then on.

    Arguments and result are tensors, other hashable values, None, and tuples, lists, dicts and dataclasses of them; they carry
    no gradient from outside in or from inside out. Each call returns tensors of its own. The calls before the recording do
    their work like any other, so a function that changes state can be given as it is.
    RuntimeError for more than ``MAX_RECORDINGS`` combinations of constants and shapes.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, Recording] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The result of the function."""
        key = (torch.is_grad_enabled(), *map(_described, leaves(arguments)))
        recording = self._recordings.get(key)
        if recording is None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= WARMUP_CALLS:
                return self.recorder.run(lambda: self.function(*arguments))
            recording = self._recordings[key] = self._record(arguments)
        for kept, given in zip(recording.arguments, tensors_of(arguments), strict=True):
            kept.copy_(given)
        recording.replay()
        return map_tensors(torch.clone, recording.result)

    def _record(self, arguments: tuple[Any, ...]) -> Recording:
        if len(self._recordings) == MAX_RECORDINGS:
            raise RuntimeError(
                f"{self.function} was called with more than {MAX_RECORDINGS} combinations of constants and shapes: "
                "what varies from call to call must be a tensor"
            )
        kept = map_tensors(torch.empty_like, arguments)
        try:
            result, replay = self.recorder.record(lambda: self.function(*kept))
        except RuntimeError as error:
            message = f"{self.function} cannot be recorded as a CUDA graph; without graphs (cuda_graph off) it may run: {error}"
            raise RuntimeError(message) from error
        return Recording(list(tensors_of(kept)), map_tensors(Tensor.detach, result), replay)


def graphed(function: Callable[..., Any], recorder: Recorder | None) -> Callable[..., Any]:
    """``function`` replayed as CUDA graphs, or as it is without a recorder."""
    return function if recorder is None else Graphed(function, recorder)


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and constants of nested containers in order; each container first gives its type and its keys or length."""
    if isinstance(value, (tuple, list)):
        yield type(value), len(value)
        parts = value
    elif isinstance(value, dict):
        yield dict, tuple(value)
        parts = value.values()
    elif is_dataclass(value):
        yield type(value)
        parts = (getattr(value, field.name) for field in fields(value))
    else:
        yield value
        return
    for part in parts:
        yield from leaves(part)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors among ``leaves``."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same containers and constants, with what ``function`` makes of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    if is_dataclass(value):
        return replace(value, **{field.name: map_tensors(function, getattr(value, field.name)) for field in fields(value)})
    return value


def _described(leaf: Any) -> Hashable:
    """What a recording depends on: a constant itself, of a tensor all but its numbers."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
