"""Functions compiled, and replayed as CUDA graphs: all kernels of a call, however many, cost the host one launch.

A function is recorded with its arguments in memory of their own; every later call writes them there and repeats the recorded
kernels at the recorded addresses. So what a call reads besides its arguments must be state that stays where it is and is
changed in place (parameters, moments, averages, meters), and what varies from call to call must be a tensor among the
arguments: any other value is a constant of the recording, and another one is another recording.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcm import backends
from fastcm.kernels.runtime.fallback import KernelUnavailableError

log = logging.getLogger("fastcm")

# Calls with new constants or shapes before they are recorded: kernels are compiled and loaded, libraries make their workspaces,
# none of which a recording may do.
WARMUP_CALLS = 3
# More than this are not recorded any more: something varies that is not a tensor.
MAX_RECORDINGS = 64
# Dynamo counts by code object and gives up after 8, but here every shape and every phase of a process is one more.
RECOMPILE_LIMIT = 256

Replay = Callable[[], None]


def compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """``function`` wrapped in torch.compile, whole and for each shape by itself; as it is where that is not wanted."""
    if not wanted:
        return function
    whole = torch.compile(function, fullgraph=True, dynamic=False)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return whole(*arguments)

    return call


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
        options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        # The outer block leaves the stream also where the end of a failed capture raises.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, **options):
            result = call()
        return result, graph.replay


@dataclass
class Recording:
    """Calls with the same constants and shapes: where they read their arguments, and what repeats them once there is that."""

    arguments: tuple[Any, ...]
    num_calls: int = 0
    result: Any = None
    replay: Replay | None = None


class Graphed:
    """``function``, recorded at its fourth call with the same constants and shapes, and replayed from then on.

    Arguments and result are tensors, other hashable values, None, and tuples, lists, dicts and dataclasses of them. No gradient
    passes in or out. Each call returns tensors of its own. The calls before the recording do their work like any other, so
    a function that changes state can be given as it is. Calls belong to one thread and one stream at a time: arguments and
    intermediate results of all calls lie in the same memory.

    After ``MAX_RECORDINGS`` combinations of constants and shapes further ones run as they are, with one warning.
    TypeError for a constant that has no hash, RuntimeError for a function that a graph cannot hold, such as one that asks
    the device.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self._recordings: dict[Hashable, Recording] = {}
        self._warned = False

    def __call__(self, *arguments: Any) -> Any:
        """The result of the function."""
        recording = self._recording_of(arguments)
        if recording is None:
            return self.function(*arguments)
        for kept, given in zip(tensors_of(recording.arguments), tensors_of(arguments), strict=True):
            kept.copy_(given.detach())
        if recording.replay is not None:
            recording.replay()
            return map_tensors(torch.clone, recording.result)
        recording.num_calls += 1
        if recording.num_calls <= WARMUP_CALLS:
            # On the memory of the recording, so that whatever depends on addresses or strides is settled before it.
            result = self.recorder.run(lambda: self.function(*recording.arguments))
            return map_tensors(lambda tensor: tensor.detach().clone(), result)
        self._record(recording)
        recording.replay()
        return map_tensors(torch.clone, recording.result)

    def _recording_of(self, arguments: tuple[Any, ...]) -> Recording | None:
        key = (*_modes(), *map(_described, leaves(arguments)))
        if key not in self._recordings:
            if len(self._recordings) == MAX_RECORDINGS:
                self._warn()
                return None
            self._recordings[key] = Recording(map_tensors(lambda tensor: torch.empty_like(tensor.detach()), arguments))
        return self._recordings[key]

    def _warn(self) -> None:
        if not self._warned:
            text = "%s was called with more than %d combinations of constants and shapes; further ones run without a CUDA graph"
            log.warning(text, self.function, MAX_RECORDINGS)
        self._warned = True

    def _record(self, recording: Recording) -> None:
        try:
            result, recording.replay = self.recorder.record(lambda: self.function(*recording.arguments))
        except (torch.OutOfMemoryError, KernelUnavailableError):
            raise
        except RuntimeError as error:
            # The end of a failed capture raises once more, after the error that says why.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            message = f"{self.function} cannot be recorded as a CUDA graph; without graphs (cuda_graph off) it may run: {cause}"
            raise RuntimeError(message) from cause
        recording.result = map_tensors(Tensor.detach, result)


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
    elif _is_record(value):
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
    if _is_record(value):
        return replace(value, **{field.name: map_tensors(function, getattr(value, field.name)) for field in fields(value)})
    return value


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _modes() -> tuple[Hashable, ...]:
    """What a call depends on besides its arguments."""
    autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, backends.requested()


def _described(leaf: Any) -> Hashable:
    """What a recording depends on: a constant itself (1, 1.0 and True are three), of a tensor all but its numbers."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if leaf.__hash__ is None:
        raise TypeError(f"a recorded call takes tensors and constants with a hash, got {leaf!r} of {type(leaf).__name__}")
    return type(leaf), "nan" if leaf != leaf else leaf  # NaN equals nothing, not even itself
