"""The distance of projected features: its definition, its gradient, and the objectives that train with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_ctm import config_of as ctm_config
from test_distillation import config_of as pair_config

from fastcm.config import parse_config
from fastcm.config.features import FeaturesConfig
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.errors import CheckpointError, ConfigError
from fastcm.nn.diff_augment import DiffAugment
from fastcm.nn.perceptual import FeatureDistance
from fastcm.random import Stream
from fastcm.train.networks import perceptual_distance, projected_features
from fastcm.train.phase import Phase
from fastcm.train.preflight import check_phases

CNN, VIT = "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"
BOTH = FeaturesConfig(distance={CNN: "random", VIT: "random"}, size=64)
ONE = {"distance": {CNN: "random"}, "size": 64}
CPU = torch.device("cpu")


def images(num: int = 3, draw: int = 0) -> torch.Tensor:
    return Stream(7, "test").uniform(torch.arange(num), (3, 16, 16), draw) * 2 - 1


def pair(num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return images(num), images(num, draw=1), torch.arange(50, 50 + num)


@pytest.fixture(scope="module")
def both() -> FeatureDistance:
    return perceptual_distance("features", BOTH, 5, CPU)


def literal(distance: FeatureDistance, x, y, index, augment=True):
    """The authors' "cnn_vit": maps by their norm over the channels, squares, the mean over pixels, the sum of the rest."""
    rows = []
    for number, network in enumerate(distance.networks):
        u = Stream(5, "distance_augment").uniform(index, (7,), number)
        draws = DiffAugment().draw(index, 0)._make((u[:, 0], u[:, 1], u[:, 2], u[:, 3:5], u[:, 5:7]))
        seen = [DiffAugment()(image, draws) if augment else image for image in (x, y)]
        for one, two in zip(*map(network, seen), strict=True):
            units = [value / (value.square().sum(1, keepdim=True).sqrt() + 1e-10) for value in (one, two)]
            rows.append((units[0] - units[1]).square().mean((2, 3)))
    return torch.cat(rows, 1).sum(1)


@pytest.mark.parametrize("augment", [True, False])
def test_is_the_published_definition_in_value_and_gradient(both, augment):
    distance = FeatureDistance(list(both.networks), 5, DiffAugment() if augment else None)
    x, y, index = pair()
    x.requires_grad_(True)
    found, wanted = distance(x, y, index), literal(distance, x, y, index, augment)
    assert found.shape == (3,)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    (slope,), (wanted_slope,) = (torch.autograd.grad(value.sum(), x) for value in (found, wanted))
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-3, atol=1e-3 * wanted_slope.abs().max().item())
    assert (found > 0.1).all()


def test_maps_are_mixed_by_projections_of_their_own_stream(both):
    assert both.augment == DiffAugment()
    first = both.networks[0]
    discriminators = projected_features({CNN: "random"}, BOTH, 5)[CNN].init_projection(5)
    name = f"init/distance_projection.{CNN}.channels.0.weight"
    weight = first.projection.channels[0].weight
    drawn = Stream(5, name).normal(torch.zeros(1, dtype=torch.int64), tuple(weight.shape))[0] * weight[0].numel() ** -0.5
    torch.testing.assert_close(weight, drawn)
    assert not torch.equal(weight, discriminators.projection.channels[0].weight)
    assert [len(first(images(1))), first(images(1))[0].shape[1]] == [4, 64]
    assert {layer.weight.shape[-1] for layer in first.projection.scales} == {1}


def test_an_image_has_its_own_distance_and_none_to_itself(both):
    x, y, index = pair(4)
    whole = both(x, y, index)
    torch.testing.assert_close(
        torch.cat([both(x[:1], y[:1], index[:1]), both(x[1:], y[1:], index[1:])]), whole, rtol=1e-3, atol=0
    )
    assert both(x, x, index).abs().max() == 0  # both images are augmented alike
    assert not torch.allclose(both(x, y, index + 100), whole, rtol=1e-3)


def test_only_x_gets_a_gradient_and_the_networks_are_frozen(both, monkeypatch):
    x, y, index = (*(image.requires_grad_() for image in pair()[:2]), pair()[2])
    graphs, real = [], type(both.networks[0]).forward

    def forward(network, seen):
        maps = real(network, seen)
        graphs.append(maps[0].requires_grad)
        return maps

    monkeypatch.setattr(type(both.networks[0]), "forward", forward)
    both(x, y, index).sum().backward()
    assert sorted(graphs) == [False, False, True, True]  # the target's features build no graph
    assert x.grad.abs().max() > 0
    assert y.grad is None
    assert not both.train().training
    assert not any(module.training for module in both.modules())
    assert not any(parameter.requires_grad for parameter in both.parameters())


def test_compiles_to_one_graph_with_the_same_result(both):
    x, y, index = pair(2)
    x.requires_grad_(True)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(x, y, index), both(x, y, index)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x)[0] for value in (found, wanted)))


# Training with it.


def config_of(kind, features=ONE, **objective):
    config = ctm_config(duration_images=32) if kind == "ctm" else pair_config(kind, duration_images=32)
    distill = config["phases"]["distill"]
    distill["objective"] = {**distill["objective"], "distance": "features", **objective}
    return {**config, "features": features}


def phase_of(config, before=None, images=0):
    """The phase "distill" at its start, or where another left off."""
    config, data = parse_config(config, "tiny"), load_resident(open_source("digits", "", labels=False), device=CPU)
    phase = Phase(config, "distill", data, CPU, 64)
    if before is not None:
        phase.load_tensors(before, images, Path("before"))
        return phase
    first = Phase(config, "pretrain", data, CPU, 0)
    first.start(None)
    phase.start(first.averaged_weights())
    return phase


@pytest.mark.parametrize("kind", ["cd", "ct", "ict", "ctm"])
def test_every_objective_of_this_distance_trains_and_resumes_bit_for_bit(kind):
    config = config_of(kind)
    whole = phase_of(config)
    start = {name: value.clone() for name, value in whole.tensors().items()}
    whole.step()
    state = {name: value.clone() for name, value in whole.tensors().items()}
    part = phase_of(config, state, 16)
    for phase in (whole, part):
        phase.step()
    one, two = whole.tensors(), part.tensors()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any("perceptual" in name for name in one)  # a function of files and the seed
    assert any(not torch.equal(one[name], start[name]) for name in start if name.startswith("net/"))
    values = whole.meter.read()
    assert values["loss"] > 0
    assert values["skipped_steps"] == 0


def checked(config):
    check_phases(parse_config(config, "tiny"), load_resident(open_source("digits", "", labels=False)), "pretrain")


@pytest.mark.parametrize("kind", ["ict", "ctm"])
@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ({}, ConfigError, r"deit_base_distilled_patch16_224 of its distance needs weights; set features\.distance\.deit"),
        ({"distance": {CNN: ""}}, ConfigError, rf"{CNN} of its distance needs weights"),
        ({"distance": {CNN: "none.safetensors"}}, CheckpointError, r"features\.distance\..*no file 'none\.safetensors'"),
        ({"distance": {"no_such_network": "random"}}, ConfigError, "timm has no feature network 'no_such_network'"),
        ({"distance": {VIT: "random"}, "size": 100}, ConfigError, "patches of 16 pixels, which do not divide a side of 100"),
        ({"distance": {CNN: "random"}, "size": 16}, ConfigError, r"features\.size"),
        ({"distance": {}}, ConfigError, r"features\.distance"),
    ],
)
def test_networks_that_cannot_be_had_are_named_before_training(kind, features, error, message):
    with pytest.raises(error, match=message):
        checked(config_of(kind, features))


def test_a_file_of_another_size_is_named(tmp_path):
    networks = projected_features({CNN: "random"}, BOTH, 5)
    weights = {name: value.contiguous() for name, value in networks[CNN].network.weights().items()}
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    config = FeaturesConfig(distance={CNN: str(path)}, size=64)
    x, y, index = pair()
    alone = perceptual_distance("features", config, 5, CPU)
    torch.testing.assert_close(alone(x, y, index), literal(alone, x, y, index), rtol=1e-4, atol=1e-6)
    first = next(iter(weights))
    save_file({**weights, first: weights[first][:1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors.*{first}"):
        perceptual_distance("features", config, 5, CPU)


def test_objectives_without_the_distance_ask_for_no_networks():
    config = config_of("ict", {}, distance="l2")
    checked(config)
    with pytest.raises(ConfigError, match="distance"):
        parse_config(config_of("ict", distance="cnn_vit"), "tiny")
