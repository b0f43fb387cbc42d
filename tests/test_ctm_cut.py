"""Where CTM's student is cut, and so at which layer its losses are weighed against each other."""

import pytest
import torch
from test_ctm import SMALL, config_of, gradients_of, networks_of, run_step
from test_objectives import SHAPE, tiny_batch

from fastcm.config import GANConfig, load_config, parse_config
from fastcm.diffusion.adversarial import adaptive_weight
from fastcm.errors import ConfigError
from fastcm.nn import UNet
from fastcm.objectives import CTM
from fastcm.random import Stream
from fastcm.train.build import build_objective
from fastcm.train.ctm_step import CTMStep

CUTS = pytest.mark.parametrize("cut", ["head", "block"])
LAST = {"head": "dec.8x8_aux_conv.weight", "block": "dec.8x8_block1.conv1.weight"}


@CUTS
@pytest.mark.parametrize("family", ["ddpmpp", "ncsnpp", "adm", "openai"])
@pytest.mark.parametrize("attention", [(), (8,)])
def test_the_tail_of_the_trunk_is_the_network(cut, family, attention):
    width = 64 if family in ("adm", "openai") else 8
    options = {**SMALL, "model_channels": width, "attn_resolutions": attention, "channel_mult": (1,)}
    net = UNet(family, 8, 1, **options, second_time=True).init_weights(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight += 0.1 * Stream(1, name).normal(torch.arange(1), tuple(weight.shape))[0]
    x = Stream(0, "x").image_normal(torch.arange(2), (1, 8, 8))
    given = x, torch.tensor([0.1, -0.5]), torch.tensor([0.0, -0.7]), torch.eye(4)[:2]
    whole = net(*given)
    features, tail = net.trunk(*given, cut), net.tail(cut)
    assert torch.equal(tail(features), whole)
    # The network's parameters are on one side or the other, and those of the tail are what its result depends on.
    own = {id(p): name for name, p in net.named_parameters()}
    names = [own[id(p)] for p in tail.parameters()]
    slopes = torch.autograd.grad(tail(features.detach()).square().sum(), list(tail.parameters()))
    assert all(slope.abs().sum() > 0 for slope in slopes)
    above = torch.autograd.grad(features.square().sum(), list(net.parameters()), allow_unused=True)
    unused = [name for (name, _), slope in zip(net.named_parameters(), above, strict=True) if slope is None]
    assert sorted(names) == sorted(unused)
    expected = {"ddpmpp": LAST, "ncsnpp": LAST}.get(family, {**LAST, "head": "out_conv.weight"})[cut]
    assert names[0] == expected


@CUTS
@pytest.mark.parametrize("adversarial", [False, True])
def test_weights_are_the_ratios_of_gradients_at_this_layer_written_literally(cut, adversarial):
    objective = CTM(distance="squared", max_solver_steps=2, num_levels=8, adaptive_layer=cut)
    networks, batch = networks_of(objective), tiny_batch(4)
    aim = Stream(5, "to").image_normal(batch.index, SHAPE)

    class Judge:
        config = GANConfig(min_weight=0.0, max_weight=1e4)

        def active(self, image):
            return adversarial

        def generator_loss(self, fake, labels, index):
            return (fake * aim).flatten(1).sum(1)

    step = CTMStep(networks, objective, 3, 0, False, Judge())
    run_step(step, batch, 0)
    found = gradients_of(networks)
    networks.student.zero_grad()

    num_steps = objective.num_solver_steps(3, 0)
    jumps = objective.jumps(batch.index, 3, num_steps)
    x_t = batch.images + jumps.t_N[:, None, None, None] * Stream(3, "noise").image_normal(batch.index, SHAPE)
    target = step.target(step.solve(x_t, jumps, num_steps, batch.labels), jumps, batch.labels)
    x_s = networks.student.jump(x_t, jumps.t_N, jumps.s_N, batch.labels)
    estimate = networks.target.jump(x_s, jumps.s_N, objective.sigma_min, batch.labels)
    consistency = (estimate - target).square().flatten(1).sum(1).mean()
    sigma = objective.dsm_sigma(batch.index, 3)
    x = batch.images + sigma[:, None, None, None] * Stream(3, "dsm_noise").image_normal(batch.index, SHAPE)
    losses = [consistency, objective.denoising_loss(networks.student(x, sigma, batch.labels), batch.images, sigma).mean()]
    if adversarial:
        losses.append((estimate * aim).flatten(1).sum(1).mean())
    weight = dict(networks.student.net.named_parameters())[LAST[cut]]
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in losses]
    factors = [1.0, *(adaptive_weight(norms[0], norm, 0.0, 1e4) for norm in norms[1:])]
    sum(factor * loss for factor, loss in zip(factors, losses, strict=True)).backward()
    expected = gradients_of(networks)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


def count_passes(net):
    passes = {"forward": 0, "backward": 0}

    def count(direction):
        passes[direction] += 1

    net.register_forward_hook(lambda *_: count("forward"))
    net.head.register_full_backward_hook(lambda *_: count("backward"))
    return passes


def test_the_cut_changes_the_weights_and_nothing_else():
    results = {}
    for dsm in ("fixed", "adaptive"):
        for cut in ("head", "block"):
            objective = CTM(distance="squared", max_solver_steps=2, num_levels=8, adaptive_layer=cut, dsm=dsm)
            networks = networks_of(objective)
            passes = count_passes(networks.target.net)
            loss_N, _ = run_step(CTMStep(networks, objective, 3, 0, False), tiny_batch(4), 0)
            results[dsm, cut] = loss_N, gradients_of(networks), passes
    for dsm in ("fixed", "adaptive"):
        (one_N, one, passes), (two_N, two, other_passes) = results[dsm, "head"], results[dsm, "block"]
        assert torch.equal(one_N, two_N)
        assert passes == other_passes == {"forward": 2, "backward": 1}  # the target's last jump, the estimate's and back
        same = all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4 * one[name].abs().max()) for name in one)
        assert same == (dsm == "fixed")


def test_compiled_pieces_are_the_plain_ones_at_the_block(monkeypatch):
    objective = CTM(distance="squared", max_solver_steps=2, num_levels=8, adaptive_layer="block")
    networks, batch = networks_of(objective), tiny_batch(2)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    found = []
    for compiled in (True, False):
        networks.student.zero_grad()
        loss_N, _ = run_step(CTMStep(networks, objective, 3, 0, compiled), batch, 0)
        found.append((loss_N, gradients_of(networks)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


def test_recipes_weigh_where_the_authors_do():
    layers = {"ctm_cifar10": "head", "ctm_cifar10_cond": "head", "ctm_cifar10_gan": "head", "ctm_digits": "head"}
    layers |= {"ctm_imagenet64": "block", "ctm_imagenet64_gan": "block"}
    for name, layer in layers.items():
        phase = list(load_config(name).phases.values())[-1]
        assert build_objective(phase.objective).adaptive_layer == layer, name
    config = config_of()
    config["phases"]["distill"]["objective"]["adaptive_layer"] = "middle"
    with pytest.raises(ConfigError, match="adaptive_layer"):
        parse_config(config, "tiny")
    with pytest.raises(ConfigError, match=r"adaptive_layer.*middle"):
        CTM(adaptive_layer="middle")
