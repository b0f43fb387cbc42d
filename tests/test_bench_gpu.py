"""The benchmark on a GPU: graphs, streams, every contestant; small shapes."""

import pytest
import torch

from fastcm.bench.cases import OP_PASSES, cases
from fastcm.bench.ceilings import copy_bandwidth, product_rate
from fastcm.bench.measure import FAILED, OK, Settings, rows
from fastcm.bench.timing import measuring_stream, time_eager, time_graph

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("op", OP_PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_contestant_is_right_and_has_device_times(op, dtype):
    wanted = ("triton", "torch", "fused", "sdpa-math", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "xformers", "apex")
    for direction in OP_PASSES[op]:
        case = next(cases(op, "digits8", 4, dtype, (direction,)))
        found = {row["backend"]: row for row in rows(case, Settings(CUDA, 0.001, wanted))}
        assert found["triton"]["status"] == found["torch"]["status"] == OK, found
        assert FAILED not in {row["status"] for row in found.values()}, found
        assert 0 < found["triton"]["kernel"]["median_us"] <= found["triton"]["call"]["median_us"] * 1.5


def test_a_graph_times_what_one_call_takes():
    x = torch.ones(1 << 26, device=CUDA)
    y = torch.empty_like(x)
    with measuring_stream(CUDA):
        one = time_graph([lambda: y.copy_(x)] * 2, 0.02)
        eager = time_eager([lambda: y.copy_(x)], 0.02)
    assert one.median_us == pytest.approx(eager.median_us, rel=0.3)


def test_ceilings_are_those_of_a_gpu():
    assert copy_bandwidth(CUDA, 0.02) > 1e11
    assert product_rate(CUDA, budget_s=0.02) > 1e13
