"""The baselines are what they say: the same network and step, written plainly."""

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import bench_step, boundary, step
from benchmarks.baselines.contestants import NETWORKS, Setup, backend, our_contestant, ours, plain, tf32
from benchmarks.baselines.plain import PlainUNet
from benchmarks.gpu.steps import GRAPH_OFF
from benchmarks.measuring.step_time import WARM_UP, measure_step
from fastcm.kernels.runtime.fallback import is_strict
from fastcm.nn.build import build_network
from fastcm.random import Stream

CPU = torch.device("cpu")


def setup_of(objective="ect", network="digits", batch=4):
    return Setup(network, objective, batch, CPU, compiler="aot_eager")


def filled(net: nn.Module) -> nn.Module:
    """Layers that start at zero would hide what comes before them."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(0.05 * Stream(0, f"test/{name}").normal(torch.zeros(1, dtype=torch.int64), tuple(p.shape))[0])
    return net


@pytest.mark.parametrize("network", ["digits", "smoke_cifar10"])
def test_the_plain_network_is_ours(network):
    setup = setup_of(network=network)
    phase, baseline = ours(setup), plain(setup)
    net, other = filled(phase.model.net).eval(), filled(baseline.net).eval()
    index = torch.arange(2)
    x = Stream(0, "x").image_normal(index, (NETWORKS[network][2], NETWORKS[network][1], NETWORKS[network][1]))
    c_noise = Stream(0, "c_noise").normal(index)
    with torch.no_grad():
        expected, found = net(x, c_noise), other(x, c_noise)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["edm", "ect"])
def test_the_compiled_step_is_the_literal_one_in_bf16(objective):
    literal, compiled = plain(setup_of(objective)), plain(setup_of(objective), compiled=True)
    losses = [[made().item() for _ in range(3)] for made in (literal, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    for name, average in literal.ema.items():
        torch.testing.assert_close(compiled.ema[name], average, rtol=1e-3, atol=1e-4)
    assert literal.ema.keys() == compiled.ema.keys()


def test_a_step_moves_weights_and_averages():
    literal = plain(setup_of())
    before = {name: p.detach().clone() for name, p in literal.net.named_parameters()}
    literal()
    moved = [name for name, p in literal.net.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 4
    name = moved[0]
    expected = torch.lerp(before[name], dict(literal.net.named_parameters())[name].detach(), 1e-4)
    torch.testing.assert_close(literal.ema[name], expected)


def test_the_block_asks_for_what_it_says_and_ends():
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    for allowed, precision in ((True, "tf32"), (False, "ieee")):
        with tf32(allowed):
            assert [place.fp32_precision for place in places] == [precision] * 2
    assert [place.fp32_precision for place in places] == before
    with backend("torch"):
        assert not is_strict()
    with backend("triton"):
        assert is_strict()
    assert not is_strict()


def test_a_step_is_measured_after_its_warm_up():
    calls = []
    result = measure_step(lambda: calls.append(torch.ones(2).sum()), images=7, device=CPU, budget_s=0.0)
    assert result["step_ms"]["n"] == 5
    assert len(calls) == WARM_UP + 1 + 5 + 1  # warm-up, one to know how many, those, one to count kernels
    assert result["images_per_s"] == pytest.approx(7e3 / result["step_ms"]["median"])
    assert result["peak_memory_bytes"] is None


def test_the_ratio_tool_writes_its_rows(tmp_path, monkeypatch, capsys):
    arguments = ["step", "--config", "digits", "--batch-size", "2", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    step.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["command"] == "python -m benchmarks.step --config digits --batch-size 2 --rounds 1"
    assert {"commit", "time", "processor", "threads", "packages"} <= result["environment"].keys()
    rows = result["rows"]
    assert [row["objective"] for row in rows] == ["EDM", "ECT"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["plain"] / row["fastcm"])
    assert capsys.readouterr().out.count("ratio") == 2


def test_the_tool_for_the_boundary_writes_where_it_ran(tmp_path, monkeypatch, capsys):
    arguments = ["boundary", "--batch-size", "2", "--q", "4", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    boundary.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["command"] == "python -m benchmarks.boundary --config digits --batch-size 2 --q 4.0 --rounds 1"
    assert {"commit", "time", "processor", "threads", "packages"} <= result["environment"].keys()
    assert (result["config"], result["batch_size"], result["q"], result["dtype"]) == ("digits", 2, 4.0, "float32")
    assert result["ratio"] == pytest.approx(result["all_rows"] / result["fastcm"])
    assert f"ratio {result['ratio']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "graph"), [((), True), ((GRAPH_OFF,), False)])
def test_on_a_gpu_our_step_is_a_graph_unless_it_is_turned_off(options, graph):
    setup = setup_of()._replace(device=torch.device("cuda"))
    contestant = our_contestant(setup, "bfloat16", True, *options)
    assert contestant.mode == {"dtype": "bfloat16", "tf32": False, "compiled": True, "cuda_graph": graph}


@pytest.mark.parametrize("name", ["eager fp32", "fastcm torch"])
def test_the_suite_measures_a_whole_step_with_its_versions(name):
    class Benchmark:
        group, extra_info = None, {}

        def pedantic(self, run, rounds, warmup_rounds):
            self.rounds = (rounds, warmup_rounds)
            run()

    benchmark = Benchmark()
    bench_step.test_step(benchmark, "ect", name)
    assert benchmark.rounds == (bench_step.ROUNDS, bench_step.WARM_UP)
    assert benchmark.extra_info["packages"]["torch"] == torch.__version__
    assert benchmark.group.startswith("ect ")


def test_the_plain_network_has_the_parameters_of_ddpmpp():
    config = setup_of(network="ddpmpp").config("bfloat16", True)
    assert (config.compute.dtype, config.compute.compile) == ("bfloat16", "on")
    net = config.network
    with torch.device("meta"):
        mine = build_network(net, (3, 32, 32), 0, 0, dropout=0.0)
        other = PlainUNet(32, 3, net.model_channels, net.channel_mult, net.num_blocks, net.attn_resolutions[0])
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (mine, other)]
    assert shapes[0] == shapes[1]
