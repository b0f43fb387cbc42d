"""CTM's adversarial stage: killed runs, split batches, steps that are not finite, and input that cannot work."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_cli
from test_ctm import GAN, adversarial_config, newest, write
from test_training import without_time
from torch._functorch import config as functorch_config

from fastcm.config import FeaturesConfig, GANConfig, parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.diffusion.adversarial import discriminator_hinge
from fastcm.errors import CheckpointError, ConfigError
from fastcm.io.bundle import model_from_header, save_bundle
from fastcm.random import Stream
from fastcm.train.adversary import Adversary
from fastcm.train.ctm_step import Gradients
from fastcm.train.phase import Phase, phase_header
from fastcm.train.preflight import check_phases
from fastcm.train.step import parts_of

CPU = torch.device("cpu")
FEATURES = FeaturesConfig.model_validate(GAN["features"])
TINY_GAN = {"width": 16, "norm": "group"}
RATE = torch.tensor(GANConfig().optimizer.lr)


def adversary_of(label_dim=0, first_image=0, **options):
    return Adversary(GANConfig(**(TINY_GAN | options)), FEATURES, label_dim, 0, first_image, CPU)


def phase_of(gan=GAN["gan"], first_image=64, **objective):
    config = parse_config(adversarial_config(gan=gan, **objective), "tiny")
    data = load_resident(open_source("digits", "", labels=False), device=CPU)
    before = Phase(config, "pretrain", data, CPU, 0)
    before.start(None)
    phase = Phase(config, "distill", data, CPU, first_image)
    phase.start(before.averaged_weights())
    return phase


def copy_of(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def differing(before, after):
    assert before.keys() == after.keys()
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def images(num=4, draw=0):
    return Stream(1, "test").image_normal(torch.arange(num), (1, 8, 8), draw).clamp(-1, 1)


# Killed runs.

DIE = """
import os, signal
from fastcm.train import adversary, ctm_step

def dying(owner, name, number):
    real, calls = getattr(owner, name), []
    def wrapped(*arguments, **options):
        calls.append(name)
        result = real(*arguments, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

dying({place}, {number})
from fastcm.cli import main
main()
"""


def config_of_a_run():
    config = adversarial_config()
    return config | {"telemetry": config["telemetry"] | {"log_images": 16, "snapshot_images": 32}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "tiny.yaml", config_of_a_run())
    run = run_cli(folder, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 0, run.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("ctm_step.CTMStep, 'target'", 2),  # the second step of the consistency stage, before any save of the phase
        ("adversary.Adversary, 'generator_loss'", 2),  # the discriminator has learned and was saved
        ("adversary.Adversary, 'accumulate'", 2),  # its gradient is there and not used
    ],
)
def test_a_run_killed_in_either_stage_and_started_again_is_bit_for_bit_the_whole_one(tmp_path, whole, place, number):
    write(tmp_path / "tiny.yaml", config_of_a_run())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DIE.format(place=place, number=number), "train", "tiny.yaml", "--out", "run"]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    assert differing(newest(whole), newest(tmp_path / "run")) == []
    assert without_time(whole) == without_time(tmp_path / "run")
    for name in ("distill", "model"):
        assert (whole / f"{name}.safetensors").read_bytes() == (tmp_path / "run" / f"{name}.safetensors").read_bytes()


# Split batches.


@pytest.mark.parametrize("options", [{}, {"different_augment": True}, {"augment": False}])
def test_losses_of_an_image_do_not_depend_on_the_part_of_the_batch_it_is_in(monkeypatch, options):
    phase = phase_of({**GAN["gan"], "start_images": 0, **options})
    batch, seen = phase.loader.batch(64), {"generator_loss": [], "discriminator_loss": []}
    monkeypatch.setattr(phase.adversary, "_count", lambda name, loss_N: seen[name].append(loss_N.detach()))
    results = []
    for size in (16, 8):
        parts = [phase.gradient(phase.gradient.prepare(part, 64), {}) for part in parts_of(batch, size)]
        for part in parts_of(batch, size):
            phase.gradient.train_discriminator(*phase.gradient.prepare_discriminator(part, 64))
        ours = [torch.cat(column) for column in zip(*parts, strict=True)]
        results.append((*ours, *(torch.cat(seen[name]) for name in seen)))
        seen = {name: [] for name in seen}
    for consistency_N, t_N, generator_N, discriminator_N in results[1:]:
        assert torch.equal(t_N, results[0][1])
        torch.testing.assert_close(consistency_N, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(generator_N, results[0][2], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(discriminator_N, results[0][3], rtol=1e-3, atol=1e-4)
    assert results[0][2].std() > 0
    assert results[0][3].std() > 0


def test_the_discriminators_gradient_adds_up_over_parts():
    found = []
    for size in (16, 4):
        phase = phase_of({**GAN["gan"], "start_images": 0})
        phase.gradient.microbatch_size = size
        phase.gradient.train_discriminator(*phase.gradient.prepare_discriminator(phase.loader.batch(64), 64))
        found.append({name: p.grad for name, p in phase.adversary.discriminator.heads.named_parameters()})
        assert all(p.grad is None for p in phase.model.parameters())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-6)


# What the discriminator sees and says.


def test_real_and_generated_images_are_augmented_alike_unless_asked_otherwise():
    index, x = torch.arange(4), images()
    for options, alike in (({}, True), ({"different_augment": True}, False), ({"augment": False}, True)):
        adversary = adversary_of(**options)
        real, fake = (adversary._logits(x, None, index, fake=fake) for fake in (False, True))
        assert torch.equal(real, fake) == alike
        adversary.accumulate(x, x, None, index)
        expected = discriminator_hinge(real, fake).mean().item()
        assert adversary.read() == {"discriminator_loss": pytest.approx(expected)}
    plain, augmented = (adversary_of(augment=augment)._logits(x, None, index, fake=True) for augment in (False, True))
    assert not torch.equal(plain, augmented)


def test_settings_of_the_discriminator_and_its_optimizer_are_followed():
    adversary = adversary_of(scale_kernel=3, optimizer={"kind": "adam", "betas": (0.1, 0.2), "eps": 1e-3})
    assert {layer.weight.shape[-1] for layer in adversary.discriminator.features[0].projection.scales} == {3}
    assert (adversary.optimizer.kind, adversary.optimizer.betas, adversary.optimizer.eps) == ("adam", (0.1, 0.2), 1e-3)
    published = adversary_of()
    assert {layer.weight.shape[-1] for layer in published.discriminator.features[0].projection.scales} == {1}
    assert (published.optimizer.kind, published.optimizer.betas) == ("radam", (0.5, 0.9))
    assert published.discriminator.features[0].network.size == FEATURES.size == 64


def test_classes_reach_the_discriminator_where_it_is_to_have_them():
    index, x = torch.arange(4), images()
    one, two = (torch.eye(3)[torch.tensor(classes)] for classes in ([0, 1, 2, 0], [1, 1, 2, 0]))
    for conditional in (True, False):
        adversary = adversary_of(label_dim=3, conditional=conditional)
        first, second = (adversary.generator_loss(x, labels, index) for labels in (one, two))
        assert (first != second).tolist() == [conditional, False, False, False]
    with pytest.raises(ConfigError, match="conditional is true, but the network has no classes"):
        adversary_of(conditional=True)


def test_it_learns_real_from_generated_images():
    adversary, index = adversary_of(augment=False), torch.arange(16)
    real, fake = images(16), 0.3 * images(16, draw=1) + 0.5
    losses = []
    for _ in range(12):
        adversary.accumulate(real, fake, None, index)
        losses.append(adversary.read()["discriminator_loss"])
        adversary.step(RATE)
    assert losses[-1] < 0.5 * losses[0]
    assert adversary.generator_loss(real, None, index).mean() < adversary.generator_loss(fake, None, index).mean()


def test_the_generators_step_leaves_no_gradient_in_the_discriminator():
    phase = phase_of({**GAN["gan"], "start_images": 0})
    phase.gradient(phase.gradient.prepare(phase.loader.batch(64), 64), {})
    assert all(p.grad is None and not p.requires_grad for p in phase.adversary.discriminator.heads.parameters())
    assert all(p.grad is not None for p in phase.model.net.head.parameters())


def test_the_discriminator_is_shown_the_batch_and_the_jumps_that_the_generator_would_make_of_it(monkeypatch):
    phase, jumps_seen, shown = phase_of(), [], []
    fake = torch.zeros(16, 1, 8, 8)
    monkeypatch.setattr(phase.gradient, "generate", lambda part, jumps: jumps_seen.append(jumps) or fake)
    monkeypatch.setattr(phase.adversary, "accumulate", lambda *arguments: shown.append(arguments))
    for num_steps in (1, 2):
        first = next(image for image in range(64, 1000) if phase.objective.num_solver_steps(0, image) == num_steps)
        batch = phase.loader.batch(first)
        phase.gradient.train_discriminator(*phase.gradient.prepare_discriminator(batch, first))
        expected = phase.objective.jumps(batch.index, 0, num_steps)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(jumps_seen[-1], expected, strict=True))
        real, generated, labels, index, share = shown[-1]
        assert torch.equal(real, batch.images)
        assert generated is fake
        assert labels is None
        assert torch.equal(index, batch.index)
        assert share == 1.0


# Start inside a run.


def test_turns_are_counted_from_the_first_batch_of_the_stage():
    adversary = adversary_of(first_image=100, start_images=40, period=3)
    turns = [(adversary.active(image), adversary.trains_discriminator(image, 16)) for image in range(100, 260, 16)]
    assert turns == [(False, False)] * 3 + [(True, False), (True, True), (True, True)] * 2 + [(True, False)]


def test_nothing_of_the_stage_shows_before_it_begins():
    later, never = phase_of({**GAN["gan"], "start_images": 32}), phase_of(None)
    before = copy_of(later.adversary.tensors())
    for _ in range(2):
        later.step()
        never.step()
    assert differing(before, later.adversary.tensors()) == []
    assert later.adversary.read() == {}
    with_it, without = ({k: v for k, v in each.tensors().items() if "adversary" not in k} for each in (later, never))
    assert differing(with_it, without) == []
    later.step()
    never.step()
    assert later.adversary.read().keys() == {"generator_loss"}
    assert differing(dict(later.model.named_parameters()), dict(never.model.named_parameters()))


@pytest.mark.parametrize("gan", [{**GAN["gan"], "start_images": 1000}, None])
def test_what_is_compiled_before_the_stage_can_be_differentiated_twice_in_it(monkeypatch, gan):
    # A first backward pass may overwrite donated buffers, and Inductor's cache serves later runs with what it finds.
    phase, donated = phase_of(gan), []
    real = phase.gradient._estimate

    def estimate(*arguments):
        donated.append(functorch_config.donated_buffer)
        return real(*arguments)

    monkeypatch.setattr(phase.gradient, "_estimate", estimate)
    phase.gradient(phase.gradient.prepare(phase.loader.batch(64), 64), {})
    assert donated == [False]


@pytest.mark.parametrize(("norms", "factor"), [((4.0, 1.0), 2.0), ((1.0, 4.0), 0.5), ((3.0, 2.0), 1.5)])
def test_the_weight_of_the_generator_loss_is_the_ratio_of_gradients_within_its_bounds(norms, factor):
    step = phase_of({**GAN["gan"], "min_weight": 0.5, "max_weight": 2.0}).gradient
    # The bias, which is large, and the features have no say.
    ctm, gan = (Gradients([torch.full((1, 1), norm), torch.full((1,), 100 / norm)], torch.zeros(1)) for norm in norms)
    assert step._gan_factor(ctm, gan).item() == pytest.approx(factor, rel=1e-3)


def test_the_discriminators_learning_rate_counts_from_its_start():
    def change(images_seen, **options):
        optimizer = {"kind": "adam", "lr": 1e-3, **options}
        adversary = adversary_of(start_images=100, optimizer=optimizer)
        before = copy_of(adversary.tensors())
        adversary.accumulate(images(), images(draw=1), None, torch.arange(4))
        adversary.step(torch.tensor(adversary.learning_rate(images_seen, 1100)))
        name = "heads/0.0.last.weight"
        return (adversary.tensors()[name] - before[name]).abs().max().item()

    full = change(100)
    assert full > 5e-4
    assert change(100, warmup_images=1000) == 0.0
    assert change(350, warmup_images=1000) == pytest.approx(full / 4, rel=1e-3)
    assert change(850, cooldown_images=500) == pytest.approx(full / 2, rel=1e-3)


# Steps that are not finite.


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e38])
def test_a_discriminator_step_that_is_not_finite_changes_no_bit(wrong):
    adversary, index = adversary_of(augment=False), torch.arange(4)
    for _ in range(2):
        adversary.accumulate(images(), images(draw=1), None, index)
        adversary.step(RATE)
    adversary.read()
    before = copy_of(adversary.tensors())
    fake = images(draw=1)
    fake[1] = wrong
    adversary.accumulate(images(), fake, None, index)
    adversary.step(RATE)
    assert differing(before, adversary.tensors()) in ([], ["meter"])
    assert all(torch.tensor(value).isfinite() for value in adversary.read().values())
    adversary.accumulate(images(), images(draw=1), None, index)
    adversary.step(RATE)
    after = adversary.tensors()
    assert {"heads/0.0.last.weight", "heads/0.0.last.v"} <= set(differing(before, after))  # the spectral norm follows
    assert all(value.isfinite().all() for value in after.values())


def test_a_verdict_that_is_not_finite_changes_nothing_in_the_student():
    phase = phase_of({**GAN["gan"], "start_images": 0})
    with torch.no_grad():
        next(iter(phase.adversary.discriminator.heads.parameters())).fill_(float("nan"))
    before = copy_of({name: value for name, value in phase.tensors().items() if not name.startswith(("adversary", "meter"))})
    phase.step()
    after = phase.tensors()
    assert differing(before, {name: after[name] for name in before}) == []
    assert phase.meter.read()["skipped_steps"] == 1


# Input that cannot work.


def checked(config):
    parsed = parse_config(config, "tiny")
    check_phases(parsed, load_resident(open_source("digits", "", labels=False)), "pretrain")


def test_a_teacher_of_another_resolution_is_named_before_training(tmp_path):
    config = adversarial_config()
    parsed = parse_config(config, "tiny")
    data = load_resident(open_source("digits", "", labels=False))
    header = replace(phase_header(parsed, "pretrain", data), image_shape=(1, 16, 16))
    net = model_from_header(header, origin=tmp_path).net.init_weights(0)
    weights = net.state_dict()
    save_bundle(tmp_path / "large.safetensors", header, weights, {})
    config["phases"]["distill"]["teacher"] = str(tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match=r"large\.safetensors.*image_shape is \(1, 16, 16\), this run needs \(1, 8, 8\)"):
        checked(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gan": {**GAN["gan"], "period": 1}}, "gan.period"),
        ({"gan": {**GAN["gan"], "norm": "layer"}}, "gan.norm"),
        ({"gan": {**GAN["gan"], "min_weight": -1.0}}, "gan.min_weight"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": -0.5}, "gamma"),
        ({"x_u": "average"}, "x_u"),
        ({"distance": "cnn"}, "distance"),
        ({"sigma_min": 80.0}, "0 < sigma_min < sigma_max"),
        ({"max_solver_steps": 8}, "max_solver_steps < num_levels"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        checked(adversarial_config(**change))


def test_features_that_cannot_be_had_are_named():
    for features, error, message in (
        ({"discriminator": {"mobilenetv3_small_050": "nowhere.safetensors"}}, CheckpointError, "nowhere.safetensors"),
        ({"discriminator": {"mobilenetv3_small_050": ""}}, ConfigError, "mobilenetv3_small_050"),
        ({"discriminator": {"no_such_network": "random"}}, ConfigError, "no_such_network"),
        ({**GAN["features"], "size": 32}, ConfigError, "too small for a discriminator"),
    ):
        config = FeaturesConfig.model_validate(features)
        with pytest.raises(error, match=message):
            Adversary(GANConfig(**TINY_GAN), config, 0, 0, 0, CPU)
    config = adversarial_config()
    config["features"] = {"discriminator": {}}
    with pytest.raises(ConfigError, match=r"features\.discriminator"):
        checked(copy.deepcopy(config))
