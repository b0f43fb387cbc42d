"""Adapters of other projects: what an absent one says, a step around a stand-in, and the projects themselves where named."""

import json
import os
import sys

import pytest
import torch

from benchmarks.baselines import peers
from benchmarks.baselines.contestants import Setup
from benchmarks.baselines.peers import NotInstalledError, commit, ect_step, fastgen_step, song_unet, variable
from benchmarks.gpu import samplers
from benchmarks.gpu.parts import run_part
from benchmarks.gpu.size import SMOKE
from benchmarks.gpu.table import markdown
from fastcm.bench.report import as_json

SETUP = Setup("digits", "ect", 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _modules_of_peers_are_forgotten():
    """A peer's module may have the name of another's."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("training", "torch_utils", "dnnlib"):
            del sys.modules[name]


NETWORKS = """
import torch
class ECMPrecond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim, model_type, **options):
        super().__init__()
        self.options = options
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0))
        self.unused = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        return self.weight.sum() * x
"""
LOSS = """
import torch
class ECMLoss:
    def __init__(self, q):
        self.q, self.ratio = q, 0.0
    def update_schedule(self, stage):
        self.ratio = 1 - 1 / self.q ** (stage + 1)
    def __call__(self, net, images, labels=None, augment_pipe=None):
        assert self.ratio == 1 - 1 / 256
        value = net(images).flatten(1).abs().sum(1)
        if net.weight[0] < 1.99995:  # after the first step
            value = value / torch.zeros(())
        return value
"""


@pytest.fixture
def fake_ect(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "networks.py").write_text(NETWORKS)
    (tmp_path / "training" / "loss.py").write_text(LOSS)
    monkeypatch.setenv(variable("ect"), str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("fake_ect")
def test_the_step_makes_gradients_finite_and_moves_weights():
    path = list(sys.path)
    step = ect_step(SETUP)
    assert sys.path == path
    values = [step().item() for _ in range(3)]
    assert values[0] > 0
    assert values[1] == torch.inf
    assert values[2] == torch.inf  # the weights are still finite: an infinite gradient was bounded


def test_finishing_updates_every_parameter_and_its_average():
    net = torch.nn.Linear(2, 1)
    weight, average = net.weight.detach().clone(), [p.detach().clone() for p in net.parameters()]
    net.weight.grad = torch.tensor([[torch.nan, torch.inf]])
    peers.finish_literally(net, average, torch.optim.SGD(net.parameters(), lr=1e-5))
    torch.testing.assert_close(net.weight.detach(), weight - torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(average[0], weight - torch.tensor([[0.0, 1e-4]]))


def test_an_absent_peer_says_how_to_name_it(monkeypatch, tmp_path):
    for name in peers.PEERS:
        monkeypatch.delenv(variable(name), raising=False)
    with pytest.raises(NotInstalledError, match=r"not installed: name its checkout by --peer ect=PATH or FASTCM_PEER_ECT"):
        ect_step(SETUP)
    monkeypatch.setenv(variable("ect"), str(tmp_path / "no"))
    with pytest.raises(NotInstalledError, match="which is no folder"):
        commit("ect")
    monkeypatch.setenv(variable("fastgen"), str(tmp_path))
    with pytest.raises(NotInstalledError, match="fastgen needs the module fastgen"):
        fastgen_step(SETUP)
    assert commit("fastgen") is None


def test_their_network_is_ours():
    words = song_unet(SETUP, SETUP.config("float32", False).network)
    assert (words["img_resolution"], words["img_channels"], words["model_channels"], words["channel_mult"]) == (
        8,
        1,
        32,
        [1, 1],
    )
    assert (words["num_blocks"], words["attn_resolutions"], words["dropout"]) == (1, [4], 0.0)


def lines_of(part, size, done=()):
    lines = []
    run_part(part, size, set(done), lines.append)
    return {line["item"]: line for line in json.loads(as_json(lines), parse_constant=pytest.fail)}


@pytest.mark.usefixtures("fake_ect")
def test_the_part_measures_who_is_here_and_says_who_is_not(monkeypatch):
    for name in ("fastgen", "diffusers"):
        monkeypatch.delenv(variable(name), raising=False)
    items = lines_of("peers", SMOKE._replace(step_s=0.0, samples=(1,)), done=["fastcm torch"])
    assert "not installed: name its checkout by --peer fastgen=PATH" in items["fastgen amp"]["unavailable"]
    assert "diffusers" in items["diffusers sampling, batch 1"]["unavailable"]
    for name in ("fastcm torch sampling, batch 1", "fastcm torch sampling as loaded, batch 1"):
        assert {key: items[name][key] for key in ("steps", "compiled", "cuda_graph")} == {
            "steps": 1,
            "compiled": False,
            "cuda_graph": False,
        }
    assert items["ect fp32"]["error"].startswith("RuntimeError: the loss after")  # the fake's loss is infinite in the end
    text = markdown({"smoke": True, "parts": {"peers": {"status": "failed", "error": "x", "items": items}}})
    assert "- fastgen amp: not installed: name its checkout" in text


def test_steps_samplers_and_commits_have_their_tables():
    step = {"step_ms": {"median": 2.0, "p20": 1.0, "p80": 3.0}, "peak_memory_bytes": None, "launches": 3, "kernels": 9}
    mode = {"dtype": "bfloat16", "compiled": False, "cuda_graph": False}
    step |= {"batch": 4, "kernel_ms": 1.5, "warm_up_s": 1.0, **mode}
    draw = mode | {"images_per_s": 10.0, "call": {"median_us": 5000.0}, "kernel_ms": 4.0, "kernels": 7, "launches": 8}
    items = {"fastcm triton": step | {"images_per_s": 400.0}, "ect tf32": step | {"images_per_s": 100.0, "commit": "abc"}}
    items |= {"diffusers sampling, batch 1": draw, "fastgen amp": {"unavailable": "not installed"}}
    text = markdown({"smoke": False, "parts": {"peers": {"status": "done", "error": None, "items": items}}})
    assert "| times as fast as | ect tf32 |\n| --- | --- |\n| fastcm triton | 4.00 |" in text
    assert "| diffusers sampling, batch 1 | bfloat16 | no | no | 10.0 | 5.000 | 4.000 | 1.25 | 7 | 8 |" in text
    assert "- ect tf32: commit abc" in text
    assert "against the official step with TF32 on | at least 3 | 4 | reached |" in text


@pytest.mark.skipif(not os.environ.get(variable("ect")), reason="no checkout of ect is named")
@pytest.mark.filterwarnings("ignore")
def test_the_official_step_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    step = ect_step(SETUP)
    assert all(torch.isfinite(step()) for _ in range(3))
    assert len(commit("ect")) == 40


@pytest.mark.skipif(not os.environ.get(variable("fastgen")), reason="no checkout of FastGen is named")
@pytest.mark.filterwarnings("ignore")
def test_the_step_of_fastgen_runs_with_its_mixed_precision():
    step = fastgen_step(SETUP)
    before = {name: p.detach().clone() for name, p in step.model.net.named_parameters()}
    average = {name: p.detach().clone() for name, p in step.model.ema.named_parameters()}
    assert all(torch.isfinite(step()) for _ in range(2))
    assert step.model.precision_amp == torch.bfloat16
    assert step.model.ratio == pytest.approx(1 - 1 / 256)
    assert any(not torch.equal(p, before[name]) for name, p in step.model.net.named_parameters())
    assert any(not torch.equal(p, average[name]) for name, p in step.model.ema.named_parameters())


@pytest.mark.skipif(not os.environ.get(variable("diffusers")), reason="no folder of diffusers is named")
@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_of_diffusers_draws():
    images = peers.diffusers_sampler(samplers._openai_model(SMOKE), 2, torch.float32)()
    assert images.shape == (2, 3, 16, 16)
