"""Functions replayed as CUDA graphs: what a recording holds, what it must not, and the same on a GPU."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from recorded_calls import OperatorRecorder

from fastcm.graphs import MAX_RECORDINGS, WARMUP_CALLS, CudaRecorder, Graphed, graphed, leaves, map_tensors, tensors_of

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


def test_grad_mode_belongs_to_the_key():
    recorder = OperatorRecorder()
    function = Graphed(lambda x: x + 1, recorder)
    for _ in range(WARMUP_CALLS + 1):
        function(torch.ones(1))
        with torch.no_grad():
            function(torch.ones(1))
    assert recorder.num_recorded == 2


def test_results_are_not_overwritten_by_later_calls():
    function = Graphed(lambda x: (x + 1, [x * 2]), OperatorRecorder())
    for _ in range(WARMUP_CALLS + 1):
        function(torch.zeros(1))
    first = function(torch.tensor([1.0]))
    function(torch.tensor([7.0]))
    assert (first[0].item(), first[1][0].item()) == (2.0, 2.0)


def test_a_number_that_varies_is_refused_before_memory_runs_out():
    function = Graphed(lambda x, step: x + step, OperatorRecorder())
    steps = [step for step in range(MAX_RECORDINGS + 1) for _ in range(WARMUP_CALLS + 1)]
    for step in steps[:-1]:
        function(torch.zeros(1), step)
    with pytest.raises(RuntimeError, match=f"more than {MAX_RECORDINGS} combinations .* must be a tensor"):
        function(torch.zeros(1), steps[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "waiting", [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x * torch.tensor([2.0, 3.0], device=x.device)]
)
def test_a_call_that_asks_the_device_or_copies_from_the_host_is_an_error_with_advice(device, waiting):
    function = Graphed(waiting, recorder_on(device))
    for _ in range(WARMUP_CALLS):
        function(torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph; without graphs"):
        function(torch.ones(2, device=device))


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
