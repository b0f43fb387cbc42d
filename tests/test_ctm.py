"""Consistency trajectory models: draws, the cut gradient against the literal one, training runs on the digits."""

from itertools import pairwise

import pytest
import torch
from conftest import run_cli
from test_objectives import SHAPE, tiny_batch
from test_training import TINY

from fastcm.config import GANConfig, parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.diffusion.adversarial import adaptive_weight
from fastcm.errors import ConfigError
from fastcm.io.bundle import load
from fastcm.model import Model
from fastcm.nn import UNet
from fastcm.objectives import CTM, Networks
from fastcm.random import Stream
from fastcm.sampling import sample
from fastcm.train.checkpoint import load_newest
from fastcm.train.ctm_step import CTMStep
from fastcm.train.phase import Phase

SMALL = {"model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,), "label_dim": 4}


def model_of(objective, seed, second_time=True, family="ddpmpp"):
    net = UNet(family, SHAPE[1], SHAPE[0], **SMALL, second_time=second_time).init_weights(seed)
    with torch.no_grad():  # layers that start at zero would hide the second time
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.copy_(Stream(seed, f"test{weight.shape}").normal(torch.arange(1), tuple(weight.shape))[0])
                weight.mul_(weight[0].numel() ** -0.5)
    return Model(net, objective.precond, SHAPE, 4, trajectory=objective.trajectory)


def networks_of(objective):
    student, target = model_of(objective, 0), model_of(objective, 1).requires_grad_(False)
    return Networks(student, target, model_of(objective, 2, second_time=False).requires_grad_(False))


def literal_loss(objective, networks, batch, seed, num_steps):
    """The same loss as one expression, and its denoising weight by two more backward passes."""
    jumps = objective.jumps(batch.index, seed, num_steps)
    t = jumps.t_N[:, None, None, None]
    x_t = batch.images + t * Stream(seed, "noise").image_normal(batch.index, SHAPE)
    with torch.no_grad():
        x_u, levels = x_t, [objective.solver_level(jumps, step) for step in range(num_steps + 1)]
        for high, low in pairwise(levels):
            slope = (x_u - networks.teacher(x_u, high, batch.labels)) / high[:, None, None, None]
            x_low = x_u + (low - high)[:, None, None, None] * slope
            slope_low = (x_low - networks.teacher(x_low, low, batch.labels)) / low[:, None, None, None]
            x_u = x_u + (low - high)[:, None, None, None] * (slope + slope_low) / 2
        target = networks.student.jump(x_u, jumps.u_N, jumps.s_N, batch.labels)
        target = networks.target.jump(target, jumps.s_N, objective.sigma_min, batch.labels)
    x_s = networks.student.jump(x_t, jumps.t_N, jumps.s_N, batch.labels)
    estimate = networks.target.jump(x_s, jumps.s_N, objective.sigma_min, batch.labels)
    consistency = (estimate - target).square().flatten(1).sum(1).mean()
    sigma = objective.dsm_sigma(batch.index, seed)
    x = batch.images + sigma[:, None, None, None] * Stream(seed, "dsm_noise").image_normal(batch.index, SHAPE)
    denoised = networks.student(x, sigma, batch.labels)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    dsm = (weight * (denoised - batch.images).square().flatten(1).mean(1)).mean()
    last = networks.student.net.dec["8x8_aux_conv"].weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (consistency, dsm)]
    return consistency + adaptive_weight(*norms) * dsm


def run_step(step, batch, first_image):
    return step(step.prepare(batch, first_image), {})


def gradients_of(networks):
    return {name: p.grad.clone() for name, p in networks.student.net.named_parameters() if p.grad is not None}


def test_the_cut_gradient_is_that_of_the_literal_expression():
    objective = CTM(distance="squared", max_solver_steps=3, num_levels=8)
    networks, batch = networks_of(objective), tiny_batch(4)
    first_image = next(i for i in range(100) if objective.num_solver_steps(3, i) == 2)
    run_step(CTMStep(networks, objective, 3, 0, compiled=False), batch, first_image)
    found = gradients_of(networks)
    networks.student.zero_grad()
    literal_loss(objective, networks, batch, 3, 2).backward()
    expected = gradients_of(networks)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-6)
    assert all(p.grad is None for p in (*networks.target.parameters(), *networks.teacher.parameters()))


@pytest.mark.parametrize("dsm", ["fixed", "none"])
def test_microbatches_only_change_rounding(dsm):
    objective = CTM(distance="l2", max_solver_steps=3, num_levels=8, dsm=dsm)
    networks, batch = networks_of(objective), tiny_batch(4)
    results = []
    for size in (0, 2):
        networks.student.zero_grad()
        loss_N, t_N = run_step(CTMStep(networks, objective, 3, size, compiled=False), batch, 0)
        results.append((loss_N, t_N, gradients_of(networks)))
    (loss, t, one), (other_loss, other_t, other) = results
    assert torch.equal(t, other_t)
    torch.testing.assert_close(loss, other_loss, rtol=1e-4, atol=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


def test_compiled_pieces_have_no_graph_breaks_and_serve_every_number_of_solver_steps(monkeypatch):
    objective = CTM(distance="pseudo_huber", c=0.1, max_solver_steps=3, num_levels=8)
    networks, batch = networks_of(objective), tiny_batch(2)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    compiled = CTMStep(networks, objective, 3, 0, compiled=True)
    firsts = [next(i for i in range(100) if objective.num_solver_steps(3, i) == steps) for steps in (1, 3)]
    for number, first_image in enumerate(firsts):
        networks.student.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            loss_N, _ = run_step(compiled, batch, first_image)
        found = gradients_of(networks)
        networks.student.zero_grad()
        expected_N, _ = run_step(CTMStep(networks, objective, 3, 0, compiled=False), batch, first_image)
        torch.testing.assert_close(loss_N, expected_N, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients_of(networks).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


def test_number_of_solver_steps_is_proportional_to_itself_and_one_for_the_batch():
    objective = CTM(max_solver_steps=5)
    drawn = torch.tensor([objective.num_solver_steps(0, first) for first in range(0, 40_000, 8)])
    shares = torch.bincount(drawn, minlength=6)[1:] / len(drawn)
    torch.testing.assert_close(shares, torch.arange(1, 6) / 15, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("num_steps", [1, 5, 17])
def test_levels_are_ordered_and_reach_all_that_is_possible(continuous, num_steps):
    objective = CTM(continuous=continuous)
    jumps = objective.jumps(torch.arange(20_000), 0, num_steps)
    assert (jumps.t_N > jumps.u_N).all()
    assert (jumps.u_N * (1 + 1e-5) >= jumps.s_N).all()
    assert (jumps.s_N > 0.00199).all()
    assert jumps.t_N.max().item() == pytest.approx(80.0, rel=1e-3)
    if not continuous:
        assert torch.equal(jumps.t_place_N.unique(), torch.arange(18 - num_steps).float())
        assert jumps.s_N.min().item() == pytest.approx(0.002, rel=1e-3)


def test_half_of_the_denoising_levels_are_lognormal_and_half_lie_high_in_the_grid():
    objective = CTM()
    sigma = objective.dsm_sigma(torch.arange(20_000), 0)
    low, high = sigma[::2].log(), sigma[1::2]
    assert low.mean().item() == pytest.approx(-1.2, abs=0.05)
    assert low.std().item() == pytest.approx(1.2, abs=0.05)
    assert high.min().item() == pytest.approx(0.318, rel=0.02)  # methods of arXiv 2310.02279's code: [0.318, 80]
    assert high.max().item() == pytest.approx(80.0, rel=0.01)


def test_without_a_teacher_the_average_makes_one_jump():
    objective = CTM(x_u="self", distance="squared")
    networks, batch = networks_of(objective)._replace(teacher=None), tiny_batch(3)
    jumps = objective.jumps(batch.index, 0, 4)
    x_u = CTMStep(networks, objective, 0, 0, compiled=False).solve(batch.images, jumps, 4, batch.labels)
    torch.testing.assert_close(x_u, networks.target.jump(batch.images, jumps.t_N, jumps.u_N, batch.labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 1}, "num_levels"),
        ({"max_solver_steps": 18}, "max_solver_steps"),
        ({"outer": "heun"}, "outer.*heun"),
        ({"weight": "inverse_gap"}, "weight.*inverse_gap"),
        ({"dsm": "often"}, "dsm.*often"),
        ({"dsm_place": 0.0}, "dsm_place"),
    ],
)
def test_impossible_constants_say_why(options, message):
    with pytest.raises(ConfigError, match=message):
        CTM(**options)


def config_of(**distill):
    phase = {
        "objective": {"kind": "ctm", "num_levels": 8, "max_solver_steps": 3, "distance": "squared"},
        "duration_images": 96,
        "batch_size": 16,
        "optimizer": {"kind": "radam", "lr": 1e-3},
    }
    pretrain = {**TINY["phases"]["pretrain"], "duration_images": 64}
    network = {**TINY["network"], "second_time": True}
    return {**TINY, "network": network, "phases": {"pretrain": pretrain, "distill": {**phase, **distill}}}


def write(path, config):
    path.write_text(parse_config(config, "tiny").to_yaml())


def test_a_resumed_run_is_bit_for_bit_the_whole_one_and_its_model_jumps(tmp_path):
    write(tmp_path / "tiny.yaml", config_of())
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "whole").returncode == 0
    part = run_cli(tmp_path, "train", "tiny.yaml", "phases.distill.duration_images=64", "--out", "part")
    assert part.returncode == 0, part.stderr
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "part").returncode == 0
    whole, part = (load(tmp_path / name) for name in ("whole", "part"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))
    assert whole.sampling.sampler == "trajectory"
    x = Stream(0, "x").image_normal(torch.arange(2), (1, 8, 8))
    assert torch.equal(whole.jump(x, 2.0, 2.0), x)
    assert sample(whole, 4, 2, gamma=0.5).isfinite().all()


def test_a_network_without_a_second_time_gets_one_that_has_no_effect_at_first(tmp_path):
    plain = config_of()
    plain["network"] = TINY["network"]
    plain["phases"] = {"pretrain": plain["phases"]["pretrain"]}
    write(tmp_path / "plain.yaml", plain)
    assert run_cli(tmp_path, "train", "plain.yaml", "--out", "plain").returncode == 0
    distill = config_of(init="plain/model.safetensors", duration_images=16, optimizer={"kind": "radam", "lr": 1e-30})
    del distill["phases"]["pretrain"]
    write(tmp_path / "ctm.yaml", distill)
    run = run_cli(tmp_path, "train", "ctm.yaml", "--out", "ctm")
    assert run.returncode == 0, run.stderr
    teacher, student = load(tmp_path / "plain"), load(tmp_path / "ctm", ema="net")
    x = Stream(0, "x").image_normal(torch.arange(2), (1, 8, 8))
    torch.testing.assert_close(student(x, 1.5), teacher(x, 1.5))


def test_a_network_without_a_second_time_is_refused_before_training(tmp_path):
    config = config_of()
    config["network"] = TINY["network"]
    write(tmp_path / "tiny.yaml", config)
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 2
    assert "network.second_time" in run.stderr


GAN = {
    "features": {"discriminator": {"mobilenetv3_small_050": "random"}, "size": 64},
    "gan": {"start_images": 32, "width": 16, "norm": "group", "augment": True},
}


def adversarial_config(**objective):
    base = {"kind": "ctm", "num_levels": 8, "max_solver_steps": 2, "distance": "squared", "gan": GAN["gan"]}
    return {**config_of(objective={**base, **objective}, duration_images=96), "features": GAN["features"]}


def adversarial_phase(first_image=0):
    config = parse_config(adversarial_config(), "tiny")
    data = load_resident(open_source("digits", "", labels=False), device=torch.device("cpu"))
    before = Phase(config, "pretrain", data, torch.device("cpu"), 0)
    before.start(None)
    phase = Phase(config, "distill", data, torch.device("cpu"), first_image)
    phase.start(before.averaged_weights())
    return phase


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return any(not torch.equal(value, module.state_dict()[name]) for name, value in before.items())


def test_generator_and_discriminator_take_turns_once_the_adversarial_stage_has_begun():
    phase, turns = adversarial_phase(first_image=64), []
    for _ in range(6):
        student, heads = states(phase.model.net), states(phase.adversary.discriminator.heads)
        average = states(phase.networks.target.net)
        phase.step()
        turns.append((changed(student, phase.model.net), changed(heads, phase.adversary.discriminator.heads)))
        assert changed(average, phase.networks.target.net) == turns[-1][0]
    assert turns == [(True, False), (True, False), (True, False), (False, True), (True, False), (False, True)]
    values = phase.adversary.read()
    assert values["discriminator_loss"] > 0
    assert "generator_loss" in values


def test_generator_loss_is_weighed_against_consistency_at_the_last_layer():
    objective = CTM(distance="squared", max_solver_steps=2, num_levels=8, dsm="none")
    networks, batch = networks_of(objective), tiny_batch(4)
    target = Stream(5, "to").image_normal(batch.index, SHAPE)

    class Judge:
        config = GANConfig(min_weight=0.0, max_weight=1e4)

        def active(self, image):
            return True

        def generator_loss(self, fake, labels, index):
            return (fake * target).flatten(1).sum(1)

    step = CTMStep(networks, objective, 3, 0, False, Judge())
    step(step.prepare(batch, 0), {})
    found = gradients_of(networks)
    networks.student.zero_grad()
    num_steps = objective.num_solver_steps(3, 0)
    jumps = objective.jumps(batch.index, 3, num_steps)
    x_t = batch.images + jumps.t_N[:, None, None, None] * Stream(3, "noise").image_normal(batch.index, SHAPE)
    aim = step.target(step.solve(x_t, jumps, num_steps, batch.labels), jumps, batch.labels)
    x_s = networks.student.jump(x_t, jumps.t_N, jumps.s_N, batch.labels)
    estimate = networks.target.jump(x_s, jumps.s_N, objective.sigma_min, batch.labels)
    consistency = (estimate - aim).square().flatten(1).sum(1).mean()
    gan = (estimate * target).flatten(1).sum(1).mean()
    last = networks.student.net.head.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (consistency, gan)]
    (consistency + adaptive_weight(*norms, 0.0, 1e4) * gan).backward()
    for name, gradient in gradients_of(networks).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)
    # What the discriminator sees is the same estimate, without a graph.
    fake = step.generate(batch, jumps)
    assert not fake.requires_grad
    torch.testing.assert_close(fake, estimate.detach(), rtol=1e-4, atol=1e-4)


def test_an_adversarial_run_resumes_bit_for_bit_and_logs_both_losses(tmp_path):
    write(tmp_path / "tiny.yaml", adversarial_config())
    whole = run_cli(tmp_path, "train", "tiny.yaml", "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert run_cli(tmp_path, "train", "tiny.yaml", "phases.distill.duration_images=64", "--out", "part").returncode == 0
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "part").returncode == 0
    one, two = (newest(tmp_path / name) for name in ("whole", "part"))
    assert one.keys() == two.keys()
    assert any(name.startswith("adversary/heads/") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    last = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "discriminator_loss" in last


def newest(run):
    return load_newest(run / "checkpoints")[0]


def test_feature_networks_without_weights_are_named_before_training(tmp_path):
    config = adversarial_config()
    config["features"] = {}
    write(tmp_path / "tiny.yaml", config)
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 2
    assert "features.discriminator" in run.stderr


SMALL_CNN = "mobilenetv3_small_050"


@pytest.mark.parametrize(
    ("features", "objective", "message"),
    [
        ({"discriminator": {SMALL_CNN: "tiny.yaml"}, "size": 64}, {}, "features.discriminator (features.size 64)"),
        ({"discriminator": {SMALL_CNN: "random"}, "size": 32}, {}, "features.discriminator (features.size 32)"),
        ({"distance": {SMALL_CNN: "tiny.yaml"}, "size": 64}, {"distance": "features", "gan": None}, "features.distance"),
        ({"lpips": "tiny.yaml"}, {"distance": "lpips", "gan": None}, "features.lpips"),
    ],
    ids=["file", "size", "distance", "lpips"],
)
def test_feature_networks_that_cannot_be_are_named_before_the_first_phase(tmp_path, features, objective, message):
    write(tmp_path / "tiny.yaml", {**adversarial_config(**objective), "features": features})
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode in (2, 3)
    assert f"phases.distill, {message}" in run.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
