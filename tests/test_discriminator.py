"""Feature networks, random projections, and the projected discriminator on them."""

import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastcm.diffusion.adversarial import discriminator_hinge, generator_hinge
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.feature_files import load_feature_network
from fastcm.nn.diff_augment import DiffAugment
from fastcm.nn.discriminator import Head, ProjectedDiscriminator, SpectralConv
from fastcm.nn.features import FeatureNetwork, MapShape
from fastcm.nn.projection import ProjectedFeatures, RandomProjection, init_layers
from fastcm.random import Stream

CNN, VIT = "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"
SIDE = 64
ONE = torch.ones(())
SHAPE = MapShape(channels=3, side=16, reduction=4)


def images(*shape: int, draw: int = 0) -> torch.Tensor:
    return Stream(7, "test").uniform(torch.arange(shape[0]), shape[1:], draw) * 2 - 1


@pytest.fixture(scope="module")
def networks() -> dict[str, FeatureNetwork]:
    return {name: FeatureNetwork(name, size=SIDE).init_weights(0) for name in (CNN, VIT)}


def discriminator(networks, **options) -> ProjectedDiscriminator:
    features = {name: ProjectedFeatures(network, cout=8) for name, network in networks.items()}
    return ProjectedDiscriminator(features, width=32, **options).init_weights(0)


def head(shape: MapShape = SHAPE, **options) -> Head:
    built = Head(shape, width=8, **options)
    with torch.no_grad():
        init_layers(built, 0, "head")
    return built


# Feature networks.


@pytest.mark.parametrize("name", [CNN, VIT])
def test_maps_are_those_of_timm_for_resized_and_normalised_images(name, networks):
    ours = networks[name]
    options = {"img_size": SIDE} if name == VIT else {}
    theirs = timm.create_model(name, features_only=True, out_indices=ours.indices, **options).eval()
    prefix = "model." if name == VIT else ""
    missing = theirs.load_state_dict({prefix + key: value for key, value in ours.weights().items()}, strict=False)
    assert not any(key.startswith(f"{prefix}blocks") for key in missing.missing_keys)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs((F.interpolate((x + 1) / 2, SIDE, mode="bilinear") - mean) / std)
    for actual, wanted, shape in zip(ours(x), expected, ours.shapes, strict=True):
        assert actual.shape == (2, shape.channels, shape.side, shape.side)
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_default_networks_have_the_published_maps_and_heads():
    cnn, vit = FeatureNetwork("tf_efficientnet_lite0"), FeatureNetwork("deit_base_distilled_patch16_224")
    assert [shape[:2] for shape in cnn.shapes] == [(24, 56), (40, 28), (112, 14), (320, 7)]
    assert [shape[:2] for shape in vit.shapes] == [(768, 14)] * 4
    assert vit.indices == [2, 5, 8, 11]
    torch.testing.assert_close(cnn.mean.flatten(), torch.zeros(3))  # Inception's statistics
    for network in (cnn, vit):
        projected = RandomProjection(network.shapes)
        assert [shape[:2] for shape in projected.shapes] == [(64, 112), (64, 56), (128, 28), (256, 14)]
        heads = [Head(shape) for shape in projected.shapes]
        assert [head.num_logits for head in heads] == [16] * 4
        assert [len(head.blocks) for head in heads] == [4, 3, 2, 1]
        assert [head.last.weight.shape[1] for head in heads] == [512] * 4
        assert [block[0].weight.shape[0] for block in heads[0].blocks] == [64, 128, 256, 512]


def test_feature_networks_are_frozen_and_draw_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    network = FeatureNetwork(CNN, size=SIDE).init_weights(0).train()
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x = images(3, 3, 16, 16)
    first = network(x)
    torch.testing.assert_close(network(x[:1])[3], first[3][:1], rtol=1e-4, atol=1e-5)  # no statistics of the batch


def test_weights_come_from_files_with_or_without_the_classifier(networks, tmp_path):
    whole = timm.create_model(CNN).state_dict()
    torch.save({"state_dict": whole}, tmp_path / "whole.pth")
    network = load_feature_network(CNN, str(tmp_path / "whole.pth"), size=SIDE)
    assert all(torch.equal(value, whole[name]) for name, value in network.weights().items())
    save_file({name: value.contiguous() for name, value in networks[CNN].weights().items()}, tmp_path / "part.safetensors")
    part = load_feature_network(CNN, str(tmp_path / "part.safetensors"), size=SIDE)
    x = images(1, 3, 16, 16)
    assert torch.equal(part(x)[3], networks[CNN](x)[3])


def test_wrong_files_networks_and_packages_are_explained(networks, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in networks[VIT].weights().items()}, path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: '.*' is (missing|not part of this network)"):
        load_feature_network(CNN, str(path), size=SIDE)
    with pytest.raises(CheckpointError, match=r"no such file"):
        load_feature_network(CNN, str(tmp_path / "none.pth"), size=SIDE)
    with pytest.raises(ConfigError, match="weights of the feature network mobilenetv3_small_050 are needed"):
        load_feature_network(CNN, "")
    with pytest.raises(ConfigError, match=r"timm has no feature network 'resnet_18'.*near: "):
        FeatureNetwork("resnet_18")
    with pytest.raises(ConfigError, match="patches of 16 pixels, which do not divide a side of 100"):
        FeatureNetwork(VIT, size=100)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install fastcm\[features\]"):
        FeatureNetwork(CNN)


# Random projections.


@pytest.mark.parametrize("name", [CNN, VIT])
def test_projection_doubles_the_sides_and_has_no_parameters(name, networks):
    features = ProjectedFeatures(networks[name], cout=8).init_projection(0)
    maps = features(images(2, 3, 32, 32))
    assert [tuple(x_map.shape) for x_map in maps] == [(2, 8, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    assert [shape.side for shape in features.shapes] == [32, 16, 8, 4]
    assert list(features.projection.parameters()) == []
    assert all(0.01 < x_map.std() < 10 for x_map in maps)


def test_projection_depends_on_the_seed_alone(networks):
    first, same, other = (ProjectedFeatures(networks[CNN], cout=8).init_projection(seed) for seed in (0, 0, 1))
    x = images(1, 3, 32, 32)
    for a, b, c in zip(first(x), same(x), other(x), strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, rtol=0.1)
    stream = Stream(0, f"init/projection.{CNN}.channels.0.weight")  # of no other network
    weight = first.projection.channels[0].weight
    torch.testing.assert_close(weight, stream.normal(torch.zeros(1).long(), tuple(weight.shape))[0] / weight.shape[1] ** 0.5)


def test_coarse_maps_reach_fine_outputs_and_not_the_other_way_round():
    shapes = [MapShape(2, side, 64 // side) for side in (16, 8, 4, 2)]
    projection = RandomProjection(shapes, cout=2)
    with torch.no_grad():
        init_layers(projection, 0, "projection")
    maps = [images(1, 2, shape.side, shape.side, draw=level) for level, shape in enumerate(shapes)]
    before = projection(maps)
    for level in range(4):
        changed = projection([x_map + (index == level) for index, x_map in enumerate(maps)])
        moved = [not torch.allclose(a, b) for a, b in zip(before, changed, strict=True)]
        assert moved == [output <= level for output in range(4)]


def test_one_by_one_scale_mixing_is_the_same_after_the_upsampling():
    projection = RandomProjection([MapShape(4, 4, 4), MapShape(4, 2, 8)], cout=4, scale_kernel=1)
    with torch.no_grad():
        init_layers(projection, 0, "projection")
    fine, coarse = images(1, 4, 4, 4), images(1, 4, 2, 2, draw=1)

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)

    mixed = [F.conv2d(x, layer.weight) for x, layer in zip((fine, coarse), projection.channels, strict=True)]
    low = F.conv2d(up(mixed[1]), projection.scales[1].weight)
    high = F.conv2d(up(mixed[0] + low), projection.scales[0].weight)
    for actual, expected in zip(projection([fine, coarse]), (high, low), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_projection_has_the_right_gradient(kernel):
    projection = RandomProjection([MapShape(16, 2, 16)] * 4, cout=2, scale_kernel=kernel)
    with torch.no_grad():
        init_layers(projection, 0, "projection")
    projection.double()
    maps = [images(1, 16, 2, 2, draw=level).double().requires_grad_(True) for level in range(4)]
    assert torch.autograd.gradcheck(lambda *given: tuple(projection(list(given))), maps, fast_mode=True)


# Spectral norm and heads.


@pytest.fixture
def convolution() -> SpectralConv:
    built = SpectralConv(3, 5, 4, stride=2, bias=True)
    with torch.no_grad():
        built.init_weights(0, "convolution")
        for _ in range(200):
            built.power_iteration(ONE)
    return built


def test_weights_are_divided_by_their_largest_singular_value(convolution):
    largest = torch.linalg.svdvals(convolution.weight.flatten(1))[0]
    torch.testing.assert_close(convolution.sigma(), largest)
    x = images(2, 3, 8, 8)
    expected = F.conv2d(x, convolution.weight / largest, convolution.bias, stride=2, padding=1)
    torch.testing.assert_close(convolution(x), expected)


def test_spectral_norm_has_pytorchs_gradient(convolution):
    plain = torch.nn.Conv2d(3, 5, 4, stride=2, padding=1)
    normed = torch.nn.utils.parametrizations.spectral_norm(plain).eval()
    state = {"original": convolution.weight, "0._u": convolution.u, "0._v": convolution.v}
    normed.load_state_dict({"bias": convolution.bias, **{f"parametrizations.weight.{k}": v for k, v in state.items()}})
    x = images(2, 3, 8, 8)
    convolution(x).square().sum().backward()
    normed(x).square().sum().backward()
    torch.testing.assert_close(convolution.weight.grad, normed.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-5)


def test_forward_moves_no_buffer_and_a_skipped_step_changes_no_bit(networks):
    net = discriminator({CNN: networks[CNN]})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(images(2, 3, 32, 32))
    net.constrain_weights(torch.zeros(()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.constrain_weights(ONE)
    changed = {name.rsplit(".", 1)[1] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"u", "v"}
    assert changed


def test_group_norm_makes_logits_independent_of_the_batch_and_batch_norm_does_not():
    x = images(4, 3, 16, 16)
    for norm, independent in (("group", True), ("batch", False)):
        net = head(norm=norm)
        split = torch.cat([net(x[:1]), net(x[1:])])
        assert torch.allclose(split, net(x), rtol=1e-4, atol=1e-5) == independent


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_head_has_the_right_gradient(norm):
    net = head(norm=norm, label_dim=2).double()
    x = images(2, 3, 16, 16).double().requires_grad_(True)
    labels = torch.eye(2, dtype=torch.float64)
    parameters = list(net.parameters())

    def logits(given, *values):
        return torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), values, strict=True)), (given, labels))

    assert torch.autograd.gradcheck(logits, (x, *parameters), fast_mode=True)


def test_the_label_adds_the_projection_of_its_embedding():
    net, x = head(label_dim=3, norm="group"), images(2, 3, 16, 16)
    labels = torch.eye(3)[[0, 2]]
    hidden = net.blocks(x)
    embedding = (net.class_embedding.weight / net.class_embedding.sigma())[:, :, 0, 0].T[[0, 2]]
    product = torch.einsum("nchw,nc->nhw", net.class_map(hidden), embedding) / 8
    torch.testing.assert_close(net(x, labels), (net.last(hidden)[:, 0] + product).flatten(1))


def test_a_map_without_room_for_a_logit_is_an_error():
    with pytest.raises(ConfigError, match="side 3 is too small for a discriminator: choose a larger image size"):
        Head(MapShape(8, 3, 16))


# The whole discriminator.


def test_logits_of_all_heads_lie_side_by_side(networks):
    net = discriminator(networks)
    x = images(2, 3, 32, 32)
    logits = net(x)
    assert logits.shape == (2, net.num_logits)
    assert net.num_logits == 2 * (25 + 25 + 25 + 1)
    alone = discriminator({VIT: networks[VIT]})(x)
    torch.testing.assert_close(logits[:, logits.shape[1] // 2 :], alone)  # streams are named after the network


def test_generator_gets_a_gradient_and_the_discriminator_step_builds_no_graph_of_features(networks):
    net = discriminator(networks)
    x = images(2, 3, 32, 32).requires_grad_(True)
    generator_hinge(net(x)).mean().backward()
    assert x.grad.abs().max() > 0
    assert not any(x_map.requires_grad for x_map in net.features[0](x.detach()))
    assert {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad} == {"heads"}


def test_state_of_the_heads_is_all_there_is_to_save(networks):
    net, other = discriminator(networks), discriminator(networks)
    with torch.no_grad():
        for parameter in net.heads.parameters():
            parameter.mul_(1.1)
    net.constrain_weights(ONE)
    other.heads.load_state_dict(net.heads.state_dict())
    x = images(2, 3, 32, 32)
    assert torch.equal(net(x), other(x))


def test_labels_and_draws_that_do_not_fit_are_errors(networks):
    net = discriminator({CNN: networks[CNN]}, label_dim=3)
    x = images(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"labels have shape None, this discriminator takes \(2, 3\)"):
        net(x)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\)"):
        net(x, torch.eye(4)[:2])
    with pytest.raises(ValueError, match="built without augmentation"):
        net.draw(torch.arange(2), 0)
    augmented = discriminator({CNN: networks[CNN]}, augment=DiffAugment())
    with pytest.raises(ValueError, match="2 sets of draws were given, this discriminator augments for 1 networks"):
        augmented(x, draws=augmented.draw(torch.arange(2), 0) * 2)


def test_each_network_sees_its_own_augmentation(networks):
    net = discriminator(networks, augment=DiffAugment())
    index, x = torch.arange(2), images(2, 3, 32, 32)
    draws, fake = net.draw(index, 0), net.draw(index, 0, fake=True)
    numbers = [draw.contrast_N for draw in (*draws, *fake)]
    assert len({tuple(row.tolist()) for row in numbers}) == 4
    assert all(torch.equal(a, b) for a, b in zip(draws[1], net.draw(index, 0)[1], strict=True))
    views = [net.augment(x, draw) for draw in draws]
    expected = [head(x_map) for number in (0, 1) for head, x_map in _heads_and_maps(net, number, views[number])]
    torch.testing.assert_close(net(x, draws=draws), torch.cat(expected, 1))


def _heads_and_maps(net, number, view):
    return zip(net.heads[number], net.features[number](view), strict=True)


def test_half_precision_features_give_nearly_the_same_fp32_logits(networks):
    features = FeatureNetwork(CNN, size=SIDE, dtype=torch.bfloat16).init_weights(0)
    x = images(8, 3, 32, 32)
    actual = discriminator({CNN: features}, norm="group")(x)
    expected = discriminator({CNN: networks[CNN]}, norm="group")(x)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.1 * expected.norm()


def test_compiles_to_one_graph_with_the_same_result(networks):
    net = discriminator({CNN: networks[CNN]}, augment=DiffAugment(), label_dim=2)
    x, labels, index = images(2, 3, 32, 32), torch.eye(2), torch.arange(2)

    def loss(given):
        return generator_hinge(net(given, labels, net.draw(index, 0)))

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), loss(x))


def test_a_few_steps_tell_two_sets_of_images_apart(networks):
    net = discriminator({CNN: networks[CNN]})
    optimizer = torch.optim.Adam(net.heads.parameters(), lr=2e-3, betas=(0.5, 0.9))
    stripes = torch.sign(torch.sin(torch.arange(32.0)))
    for step in range(12):
        noise = images(16, 3, 32, 32, draw=step) * 0.3
        real, fake = noise[:8] + stripes, noise[8:] + stripes[:, None]
        loss = discriminator_hinge(net(real), net(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.constrain_weights(ONE)
    noise = images(16, 3, 32, 32, draw=99) * 0.3
    with torch.no_grad():
        assert (net(noise[:8] + stripes).mean(1) > 0).all()
        assert (net(noise[8:] + stripes[:, None]).mean(1) < 0).all()
