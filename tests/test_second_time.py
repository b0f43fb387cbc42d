"""How the second time of CTM's networks begins: without effect, or like the first time, as published."""

import math
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from convert_cases import edm_pickle

from fastcm.config import parse_config
from fastcm.data.dataset import ResidentDataset
from fastcm.diffusion.preconditioners import EDM
from fastcm.errors import ConfigError
from fastcm.io.bundle import load, read_header
from fastcm.model import Model
from fastcm.nn import UNet
from fastcm.random import Stream
from fastcm.train.phase import Phase
from fastcm.train.preflight import check_phases

CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm", "openai"])
SIZES = {"model_channels": 32, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": ()}


def network(family, seed=3, **options):
    return UNet(family, 8, 1, label_dim=10, **SIZES, **options).init_weights(seed)


def moved(net):
    """Every parameter of the diffusion model moved from its start, where many are zero."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight += 0.1 * Stream(1, name).normal(torch.zeros(1, dtype=torch.int64), tuple(weight.shape))[0]
    return net


@FAMILIES
def test_g_is_the_diffusion_model_exactly_unless_asked_otherwise(family):
    diffusion = moved(network(family))
    x = 5 * Stream(0, "x").image_normal(torch.arange(3), (1, 8, 8))
    t, s, labels = torch.tensor([40.0, 5.0, 0.7]), torch.tensor([3.0, 5.0, 0.002]), torch.eye(10)[:3]
    D = Model(diffusion, EDM(0.5), (1, 8, 8), 10)(x, t, labels)
    for begins, same in ((None, True), ("zero", True), ("random", False)):
        net = network(family, second_time=True, **({} if begins is None else {"second_time_init": begins}))
        net.load_state_dict(net.state_dict() | diffusion.state_dict())
        model = Model(net, EDM(0.5), (1, 8, 8), 10)
        ratio = (s / t)[:, None, None, None]
        expected = model.trajectory.jump(x, D, t, s)
        torch.testing.assert_close(expected, ratio * x + (1 - ratio) * D)
        assert torch.equal(model.jump(x, t, s, labels), expected) == same
        assert torch.equal(model(x, t, labels), D) == same
        assert torch.equal(model.jump(x, t, t, labels), x)


@FAMILIES
def test_random_is_the_distribution_of_the_first_times_layers(family):
    net = network(family, second_time=True, second_time_init="random")
    assert len(net._blocks) > 5
    for block in net._blocks:
        outputs, inputs = block.affine_s.weight.shape
        song = family in ("ddpmpp", "ncsnpp")
        # Glorot's for EDM's networks, PyTorch's own for OpenAI's and ADM.
        bound = math.sqrt(6 / (inputs + outputs)) if song else 1 / math.sqrt(inputs)
        for weight, limit in ((block.affine_s.weight, bound), (block.affine_s.bias, 0.0 if song else bound)):
            assert weight.abs().max().item() <= limit * 1.000001
            num = weight.numel()
            assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=4 / math.sqrt(num))
            assert abs(weight.mean().item()) <= 4 * limit / math.sqrt(3 * num)
        assert not torch.equal(block.affine_s.weight, block.affine.weight)


@FAMILIES
def test_weights_are_a_function_of_the_seed_alone_and_no_others_change(family):
    first, same, other = (network(family, seed, second_time=True, second_time_init="random") for seed in (3, 3, 4))
    zero = dict(network(family, second_time=True).named_parameters())
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(same.named_parameters())[name])
        layer = name.rsplit(".", 2)[-2]
        if layer == "affine_s":
            assert not zero[name].any()
        else:
            assert torch.equal(weight, zero[name])
    name = next(name for name, _ in first.named_parameters() if name.endswith("affine_s.weight"))
    assert not torch.equal(dict(first.named_parameters())[name], dict(other.named_parameters())[name])
    weight = dict(first.named_parameters())[name]
    uniform = Stream(3, f"init/{name}").uniform(torch.zeros(1, dtype=torch.int64), tuple(weight.shape))[0] * 2 - 1
    torch.testing.assert_close(weight, uniform * weight.abs().max() / uniform.abs().max())


def ctm_of(bundle, begins):
    network = read_header(bundle).network if bundle.exists() else {"family": "ddpmpp"}
    objective = {"kind": "ctm", "num_levels": 8, "max_solver_steps": 2, "distance": "squared"}
    distill = {"objective": objective, "init": str(bundle), "duration_images": 16, "batch_size": 4}
    return {"network": {**network, "second_time": True, "second_time_init": begins}, "phases": {"distill": distill}}


def test_a_converted_diffusion_model_gets_either_start_and_the_bundle_keeps_its_weights(tmp_path):
    edm_pickle("A_ddpmpp_uncond")(tmp_path / "edm.pkl")
    converted = run_cli(tmp_path, "convert", "edm.pkl", "edm.safetensors")
    assert converted.returncode == 0, converted.stderr
    teacher = load(tmp_path / "edm.safetensors")
    channels, side, _ = teacher.image_shape
    data = ResidentDataset(torch.zeros(4, side, side, channels, dtype=torch.uint8), None, 0, "black", "black")
    x = Stream(0, "x").image_normal(torch.arange(2), teacher.image_shape)
    for begins in ("zero", "random"):
        config = parse_config(ctm_of(tmp_path / "edm.safetensors", begins), "tiny")
        check_phases(config, data, "distill")
        phase = Phase(config, "distill", data, CPU, 0)
        phase.start(None)
        second = {name: value for name, value in phase.model.net.state_dict().items() if ".affine_s." in name}
        fresh = phase.model.net.state_dict()
        assert any(value.any() for value in second.values()) == (begins == "random")
        assert all(torch.equal(fresh[name], value) for name, value in teacher.net.state_dict().items())
        same = torch.allclose(phase.model(x, 2.0), teacher(x, 2.0), rtol=1e-4, atol=1e-4)
        assert same == (begins == "zero")


def test_a_start_without_a_second_time_is_refused():
    config = ctm_of(Path("edm.safetensors"), "random")
    config["network"]["second_time"] = False
    with pytest.raises(ConfigError, match="second_time_init is 'random', but second_time is false"):
        parse_config(config, "tiny")
