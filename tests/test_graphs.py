"""Functions replayed as CUDA graphs: what a recording holds, what it must not, and the same on a GPU."""

import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from recorded_calls import OperatorRecorder

from fastcm import backends
from fastcm.graphs import (
    MAX_RECORDINGS,
    WARMUP_CALLS,
    CudaRecorder,
    Graphed,
    compiled,
    graphed,
    leaves,
    map_tensors,
    tensors_of,
)
from fastcm.kernels.runtime.fallback import KernelUnavailableError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def recorder_on(device):
    return CudaRecorder(torch.device(device)) if device == "cuda" else OperatorRecorder()


class Pair(NamedTuple):
    first: object
    second: object


@dataclass(frozen=True, eq=False)
class Record:
    values: object
    name: str


@pytest.mark.parametrize("device", DEVICES)
def test_result_follows_the_arguments_before_and_after_the_recording(device):
    function = Graphed(lambda x, y: {"sum": x + 2 * y, "name": "constant"}, recorder_on(device))
    for step in range(WARMUP_CALLS + 4):
        x, y = (torch.full((3,), float(step + k), device=device) for k in (0, 5))
        result = function(x, y)
        assert result["name"] == "constant"
        assert result["sum"].tolist() == [3.0 * step + 10] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_state_advances_once_a_call(device):
    state = torch.zeros(2, device=device)

    def advance(by):
        state.add_(by)
        return state * 10

    function = Graphed(advance, recorder_on(device))
    results = [function(torch.tensor(1.0, device=device)) for _ in range(WARMUP_CALLS + 3)]
    assert state.tolist() == [WARMUP_CALLS + 3.0] * 2
    assert [result[0].item() for result in results] == [10.0 * (k + 1) for k in range(WARMUP_CALLS + 3)]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_part_of_a_recording(device):
    weight = torch.ones(4, device=device, requires_grad=True)

    def descend(x):
        loss = (weight * x).square().sum()
        loss.backward()
        with torch.no_grad():
            weight.sub_(0.01 * weight.grad)
        weight.grad = None
        return loss.detach()

    function, x = Graphed(descend, recorder_on(device)), torch.arange(4.0, device=device)
    losses = [function(x).item() for _ in range(8)]
    reference, expected = torch.ones(4, device=device), []
    for _ in range(8):
        expected.append((reference * x).square().sum().item())
        reference = reference - 0.01 * 2 * reference * x * x
    assert losses == pytest.approx(expected, rel=1e-5)


def test_constants_and_shapes_have_recordings_of_their_own():
    recorder = OperatorRecorder()
    function = Graphed(lambda x, factor: x * factor, recorder)
    for _ in range(WARMUP_CALLS + 2):
        assert function(torch.ones(2), 3).tolist() == [3.0, 3.0]
        assert function(torch.ones(2), 4).tolist() == [4.0, 4.0]
        assert function(torch.ones(1), 4).tolist() == [4.0]
    assert recorder.num_recorded == 3
    assert recorder.num_replayed == 6


@pytest.mark.parametrize(
    "variant", [lambda: torch.ones(2, 2).t(), lambda: torch.ones(2, 2).double(), lambda: None, lambda: [torch.ones(2, 2)]]
)
def test_layout_dtype_and_structure_belong_to_the_key(variant):
    recorder = OperatorRecorder()
    function = Graphed(lambda x: map_tensors(lambda tensor: tensor + 1, x), recorder)
    for _ in range(WARMUP_CALLS + 1):
        function(torch.ones(2, 3).t()[:2].clone().contiguous())
        function(variant())
    assert recorder.num_recorded == 2


def test_results_are_not_overwritten_by_later_calls():
    function = Graphed(lambda x: (x + 1, [x * 2]), OperatorRecorder())
    for _ in range(WARMUP_CALLS + 1):
        function(torch.zeros(1))
    first = function(torch.tensor([1.0]))
    function(torch.tensor([7.0]))
    assert (first[0].item(), first[1][0].item()) == (2.0, 2.0)


def test_a_number_that_varies_runs_as_it_is_with_one_warning(caplog):
    recorder = OperatorRecorder()
    function = Graphed(lambda x, step: x + step, recorder)
    for step in range(10 * MAX_RECORDINGS):
        assert function(torch.zeros(1), step).item() == step
    assert len(function._recordings) == MAX_RECORDINGS
    (record,) = caplog.records
    assert "further ones run without a CUDA graph" in record.getMessage()


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "backend": lambda: backends.use_backend("torch"),
}


@pytest.mark.parametrize("mode", [name if name != "autocast" else pytest.param(name, marks=pytest.mark.gpu) for name in MODES])
def test_what_a_call_depends_on_besides_its_arguments_belongs_to_the_key(mode):
    recorder = OperatorRecorder()
    function = Graphed(lambda x: x + 1, recorder)
    for _ in range(WARMUP_CALLS + 2):
        function(torch.ones(1))
        with MODES[mode]():
            function(torch.ones(1))
    assert recorder.num_recorded == 2


def test_constants_of_other_types_are_other_constants():
    function = Graphed(lambda x, factor: x * factor, OperatorRecorder())
    for _ in range(WARMUP_CALLS + 2):
        for factor, dtype in ((1, torch.int64), (1.0, torch.float32), (True, torch.int64)):
            assert function(torch.ones(2, dtype=torch.int64), factor).dtype == dtype


def test_nan_is_a_constant_like_any_other_and_what_has_no_hash_is_refused():
    recorder = OperatorRecorder()
    function = Graphed(lambda x, factor: x * factor, recorder)
    for _ in range(WARMUP_CALLS + 2):
        assert function(torch.ones(1), float("nan")).isnan()
    assert recorder.num_recorded == 1
    with pytest.raises(TypeError, match=r"constants with a hash, got \{1\} of set"):
        function(torch.ones(1), {1})


def test_no_gradient_passes_before_the_recording_nor_after():
    function, x = Graphed(lambda x: x * 2, OperatorRecorder()), torch.ones(2, requires_grad=True)
    assert [function(x).requires_grad for _ in range(WARMUP_CALLS + 2)] == [False] * (WARMUP_CALLS + 2)


def test_a_result_that_is_an_argument_is_not_overwritten_either():
    function = Graphed(lambda x: x, OperatorRecorder())
    results = [function(torch.tensor([float(k)])) for k in range(WARMUP_CALLS + 2)]
    assert [result.item() for result in results] == [float(k) for k in range(WARMUP_CALLS + 2)]


def test_calls_before_the_recording_see_the_memory_of_the_recording():
    # So whatever is compiled for strides and addresses is compiled before.
    seen = []
    function = Graphed(lambda x: seen.append((x.data_ptr(), x.stride())) or x + 1, OperatorRecorder())
    for step in range(WARMUP_CALLS + 1):
        function(torch.tensor(float(step)).expand(4))
    assert len(seen) == WARMUP_CALLS + 1
    assert set(seen) == {(seen[0][0], (1,))}


WAITING = [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x * torch.tensor([2.0, 3.0], device=x.device)]


@pytest.mark.parametrize("waiting", WAITING, ids=["item", "mask", "host"])
def test_a_call_that_asks_the_device_or_copies_from_the_host_is_an_error_with_advice(waiting):
    function = Graphed(waiting, OperatorRecorder())
    for _ in range(WARMUP_CALLS):
        function(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph; without graphs .* not permitted when stream"):
        function(torch.ones(2))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KernelUnavailableError("none")])
def test_other_errors_of_a_recorded_call_stay_what_they_are(error):
    calls = []

    def failing(x):
        calls.append(x)
        if len(calls) > WARMUP_CALLS:
            raise error
        return x + 1

    function = Graphed(failing, OperatorRecorder())
    for _ in range(WARMUP_CALLS):
        function(torch.ones(2))
    with pytest.raises(type(error), match=str(error)):
        function(torch.ones(2))


FAILING = """
import torch
from fastcm.graphs import WARMUP_CALLS, CudaRecorder, Graphed
function, stream = Graphed(lambda x: x * x.sum().item(), CudaRecorder(torch.device("cuda"))), torch.cuda.current_stream()
try:
    for _ in range(WARMUP_CALLS + 1):
        function(torch.ones(2, device="cuda"))
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == stream
"""


@pytest.mark.gpu
def test_a_failed_capture_says_why_and_leaves_the_stream():
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be recorded as a CUDA graph" in done.stdout
    assert "captur" in done.stdout.split("it may run: ")[1]


def test_compiled_functions_serve_more_shapes_than_dynamo_keeps_by_default(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    function = compiled(lambda x: x * 2, True)
    for size in range(1, 13):
        assert function(torch.ones(size)).sum().item() == 2.0 * size
    assert compiled(len, False) is len


def test_without_a_recorder_a_function_stays_what_it_is():
    assert graphed(len, None) is len


def test_containers_are_walked_and_rebuilt():
    value = {"a": Pair(torch.zeros(1), 3), "b": [Record((torch.ones(2), None), "n"), "text"]}
    assert [tuple(t.shape) for t in tensors_of(value)] == [(1,), (2,)]
    doubled = map_tensors(lambda tensor: tensor + 1, value)
    assert isinstance(doubled["a"], Pair)
    assert doubled["a"].second == 3
    assert doubled["b"][0].values[0].tolist() == [2.0, 2.0]
    assert (doubled["b"][0].name, doubled["b"][0].values[1], doubled["b"][1]) == ("n", None, "text")
    assert list(leaves([1, 2])) != list(leaves([[1, 2]]))
    assert list(leaves({"a": 1})) != list(leaves({"b": 1}))
    assert list(leaves((1, 2))) != list(leaves([1, 2]))
