"""What CTM's phases promise for many nodes and for each way to start them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ctm import GAN, adversarial_config, config_of, gradients_of, literal_loss, networks_of, run_step
from test_ctm_adversarial import copy_of, differing, phase_of
from test_objectives import tiny_batch

from fastcm.config import load_config, parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.errors import ConfigError
from fastcm.objectives import CTM
from fastcm.train.ctm_step import CTMStep
from fastcm.train.phase import Phase
from fastcm.train.preflight import check_phases
from fastcm.train.step import parts_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits():
    return load_resident(open_source("digits", "", labels=False), device=CPU)


def test_halves_of_a_batch_have_the_losses_of_the_whole_and_adaptive_weights_of_their_own():
    objective = CTM(distance="squared", max_solver_steps=3, num_levels=8)
    networks, batch = networks_of(objective), tiny_batch(4)
    num_steps = objective.num_solver_steps(3, 0)
    step, denoising = CTMStep(networks, objective, 3, 0, compiled=False), []
    real = step._denoising
    step._denoising = lambda *arguments: denoising.append(real(*arguments)) or denoising[-1]
    loss_N, t_N = run_step(step, batch, 0)
    parts, gradients = [], []
    for part in parts_of(batch, 2):
        networks.student.zero_grad()
        parts.append(run_step(step, part, 0))
        gradients.append(gradients_of(networks))
        networks.student.zero_grad()
        literal_loss(objective, networks, part, 3, num_steps).backward()
        for name, gradient in gradients_of(networks).items():
            close = {"rtol": 1e-3, "atol": 1e-4 * gradient.abs().max().item() + 1e-6}
            torch.testing.assert_close(gradients[-1][name], gradient, **close)
    ours_N, levels_N = (torch.cat(column) for column in zip(*parts, strict=True))
    assert torch.equal(levels_N, t_N)
    torch.testing.assert_close(ours_N, loss_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(denoising[1:]), denoising[0], rtol=1e-4, atol=1e-5)
    networks.student.zero_grad()
    run_step(CTMStep(networks, objective, 3, 2, compiled=False), batch, 0)
    for name, gradient in gradients_of(networks).items():
        mean = (gradients[0][name] + gradients[1][name]) / 2
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-4 * mean.abs().max().item() + 1e-6)
    # Another place in the run is another draw, and so is the first image of the batch for the number of solver steps.
    elsewhere = next(iter(parts_of(replace(batch, index=batch.index + 2), 2)))
    assert not torch.allclose(run_step(step, elsewhere, 0)[0], loss_N[:2], rtol=0.01)


def test_no_step_asks_the_global_generator():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        phase = phase_of({**GAN["gan"], "start_images": 0})
        for _ in range(2):  # the generator's turn and the discriminator's
            phase.step()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(copy_of(phase.tensors()))
    assert differing(*results) == []
    assert {name.split("/")[0] for name in results[0]} == {
        *("net", "ema", "target", "teacher", "adversary", "optimizer", "meter")
    }


@pytest.mark.parametrize(
    "options", [{"x_u": "self"}, {"continuous": True}, {"x_u": "self", "continuous": True}, {"outer": "variance"}]
)
def test_every_variant_trains_and_resumes_bit_for_bit(digits, options):
    config = config_of()
    distill = config["phases"]["distill"]
    distill["objective"] = {**distill["objective"], **options}
    from_scratch = options.get("x_u") == "self"
    if from_scratch:
        del config["phases"]["pretrain"]
    parsed = parse_config(config, "tiny")
    check_phases(parsed, digits, next(iter(parsed.phases)))
    previous = None
    if not from_scratch:
        pretrain = Phase(parsed, "pretrain", digits, CPU, 0)
        pretrain.start(None)
        previous = pretrain.averaged_weights()
    whole, part = (Phase(parsed, "distill", digits, CPU, 64) for _ in range(2))
    whole.start(previous)
    assert (whole.networks.teacher is None) == from_scratch
    start = copy_of(whole.tensors())
    assert any(name.startswith("teacher/") for name in start) != from_scratch
    whole.step()
    part.load_tensors(copy_of(whole.tensors()), 16, Path("before"))
    for phase in (whole, part):
        phase.step()
    assert differing(whole.tensors(), part.tensors()) == []
    assert any(name.startswith("net/") for name in differing(start, whole.tensors()))
    values = whole.meter.read()
    assert values["loss"] > 0
    assert values["skipped_steps"] == 0


def test_self_teaching_has_no_use_for_a_teacher(digits):
    config = config_of(teacher="teacher.safetensors")
    config["phases"]["distill"]["objective"]["x_u"] = "self"
    with pytest.raises(ConfigError, match=r"teacher\.safetensors.*no use for a teacher"):
        check_phases(parse_config(config, "tiny"), digits, "pretrain")


def test_the_adversarial_stage_is_a_launch_of_its_own_where_that_is_asked_for(digits, tmp_path):
    first = parse_config(adversarial_config(gan=None), "tiny")
    pretrain = Phase(first, "pretrain", digits, CPU, 0)
    pretrain.start(None)
    pretrain.step()
    pretrain.save_bundle(tmp_path / "edm.safetensors")
    ctm = Phase(first, "distill", digits, CPU, 64)
    ctm.start(pretrain.averaged_weights())
    for _ in range(2):
        ctm.step()
    ctm.save_bundle(tmp_path / "ctm.safetensors")

    config = adversarial_config(gan={**GAN["gan"], "start_images": 0})
    sources = {"init": str(tmp_path / "ctm.safetensors"), "teacher": str(tmp_path / "edm.safetensors")}
    config["phases"] = {"adversarial": {**config["phases"]["distill"], **sources}}
    second = parse_config(config, "tiny")
    check_phases(second, digits, "adversarial")
    phase = Phase(second, "adversarial", digits, CPU, 0)
    phase.start(None)
    for model, weights in (
        (phase.model, ctm.averaged_weights()),
        (phase.networks.target, ctm.averaged_weights()),
        (phase.networks.teacher, pretrain.averaged_weights()),
    ):
        assert differing(dict(model.net.state_dict()), dict(weights)) == []
    assert differing(dict(ctm.averaged_weights()), dict(pretrain.averaged_weights()))
    heads = copy_of(phase.adversary.tensors())
    turns = []
    for _ in range(3):
        student = copy_of(phase.model.net.state_dict())
        phase.step()
        turns.append(bool(differing(student, dict(phase.model.net.state_dict()))))
    assert turns == [True, False, True]
    assert differing(heads, phase.adversary.tensors())


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.5), (0.0, 0.002), (2.0, -0.1)])
def test_a_jump_upwards_says_so(t, s):
    model = networks_of(CTM()).student
    with pytest.raises(ValueError, match=rf"from t down to s with 0 <= s <= t, got t {t} and s {s}"):
        model.jump(torch.zeros(1, *model.image_shape), t, s)


@pytest.mark.parametrize("name", ["ctm_cifar10", "ctm_cifar10_cond", "ctm_cifar10_gan", "ctm_imagenet64", "ctm_imagenet64_gan"])
def test_recipes_state_source_images_and_predicted_hours(name):
    lines = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    phase = list(load_config(name).phases.values())[-1]
    assert "arXiv 2310.02279" in comment
    assert f"{phase.duration_images / 1e6:g} Mimg" in comment
    assert re.search(r"[Pp]redicted from FLOPs.*[\d,]+ GPU-hours|[\d,]+ GPU-hours predicted from FLOPs", comment)
    assert "not measured" in comment
