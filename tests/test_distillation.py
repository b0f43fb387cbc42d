"""Phases with a teacher or a target network, run as a user runs them: CD, CT, iCT and progressive distillation of digits."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_cli
from test_training import TINY

from fastcm.config import parse_config
from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.io.bundle import load
from fastcm.io.tensors import read_tensors
from fastcm.sampling import sample
from fastcm.train.checkpoint import list_checkpoints
from fastcm.train.phase import Phase

OBJECTIVES = {
    "cd": {"kind": "cd", "end_scales": 9, "target": "fixed", "target_halflife_images": 40.0},
    "ct": {"kind": "ct", "start_scales": 3, "end_scales": 12, "scales_images": 64, "target_halflife_images": 20.0},
    "ict": {"kind": "ict", "start_scales": 4, "end_scales": 16, "scales_images": 64},
    "pd": {"kind": "pd", "start_steps": 4, "end_steps": 1, "stage_images": 32},
}


def config_of(kind, **phase):
    second = {
        "objective": OBJECTIVES[kind],
        "duration_images": 96,
        "batch_size": 16,
        "dropout": 0.1,
        "optimizer": {"kind": "radam", "lr": 1e-3},
    }
    first = {**TINY["phases"]["pretrain"], "duration_images": 64}
    return {**TINY, "phases": {"pretrain": first, "distill": {**second, **phase}}}


def write_config(path, kind, **phase):
    path.write_text(parse_config(config_of(kind, **phase), "tiny").to_yaml())


def phase_of(kind, **options):
    data = load_resident(open_source("digits", "", labels=False), device=torch.device("cpu"))
    config = parse_config(config_of(kind, **options), "tiny")
    before = Phase(config, "pretrain", data, torch.device("cpu"), 0)
    before.start(None)
    phase = Phase(config, "distill", data, torch.device("cpu"), 64)
    phase.start(before.averaged_weights())
    return phase


def state_of(model):
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_killed_run_continues_bit_for_bit_and_leaves_images(kind, tmp_path):
    write_config(tmp_path / "tiny.yaml", kind)
    whole = run_cli(tmp_path, "train", "tiny.yaml", "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    # A run that ended at its first checkpoint in the second phase, by the same means that a killed one continues from.
    part = run_cli(tmp_path, "train", "tiny.yaml", "phases.distill.duration_images=64", "--out", "part")
    assert part.returncode == 0, part.stderr
    rest = run_cli(tmp_path, "train", "tiny.yaml", "--out", "part")
    assert rest.returncode == 0, rest.stderr
    first, second = (read_tensors(tmp_path / run / "distill.safetensors")[0] for run in ("whole", "part"))
    assert same(first, second)
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and line["skipped_steps"] == 0 for line in metrics)
    images = run_cli(tmp_path, "sample", "whole", "--num", "4", "--out", "out.png")
    assert images.returncode == 0, images.stderr


def test_teacher_stays_as_it_is_and_the_target_follows_the_student():
    phase = phase_of("cd")
    teacher, start = state_of(phase.networks.teacher), state_of(phase.model)
    assert same(teacher, start)
    beta = 0.5 ** (16 / 40.0)
    target = state_of(phase.networks.target)
    assert same(target, start)
    for _ in range(2):
        phase.step()
        now = state_of(phase.model)
        for name, value in target.items():
            expected = beta * value + (1 - beta) * now[name]
            torch.testing.assert_close(phase.networks.target.net.state_dict()[name], expected, rtol=1e-5, atol=1e-7)
        target = state_of(phase.networks.target)
    assert same(state_of(phase.networks.teacher), teacher)
    assert not same(now, start)
    assert all(not parameter.requires_grad for parameter in phase.networks.target.parameters())
    assert all(parameter.grad is None for parameter in phase.networks.teacher.parameters())


def test_student_is_its_own_target_without_an_average():
    phase = phase_of("ict")
    assert phase.networks.target is None
    assert phase.networks.teacher is None


def test_student_becomes_the_teacher_when_the_steps_are_halved():
    phase = phase_of("pd")
    first = state_of(phase.networks.teacher)
    for _ in range(2):
        phase.step()
    assert same(state_of(phase.networks.teacher), first)
    student = state_of(phase.model)
    assert not same(student, first)
    phase.step()
    assert same(state_of(phase.networks.teacher), student)
    assert phase.optimizer.num_steps == 1
    assert phase.sampling_model().sampling.steps == 2


ANNEALED = {
    "objective": {**OBJECTIVES["pd"], "stage_images": 64},
    "duration_images": 176,
    "optimizer": {"kind": "adam", "lr": 1e-3, "warmup_images": 32, "cooldown_images": 32},
    "emas": {
        "main": {"halflife_images": 64, "rampup_ratio": 0.5},
        "wide": {"kind": "power", "std": 0.1},
    },
}


def test_each_stage_warms_up_and_cools_down_anew():
    phase = phase_of("pd", **ANNEALED)
    rates, betas = [], []
    while not phase.finished:
        rates.append(phase.learning_rate)
        betas.append(phase._ema_betas().tolist())
        phase.step()
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2 + [0, 5e-4, 5e-4])  # the last stage ends with the phase
    assert betas[4:8] == betas[:4]
    assert betas[4] == [0, 0]  # averages begin at the weights
    assert betas[7][0] == pytest.approx(0.5 ** (16 / 24))


def test_a_run_resumed_within_a_later_stage_continues_bit_for_bit(tmp_path):
    write_config(tmp_path / "tiny.yaml", "pd", **ANNEALED)
    often = ["telemetry.snapshot_images=16", "telemetry.keep_checkpoints=20"]
    whole = run_cli(tmp_path, "train", "tiny.yaml", *often, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    saved = list_checkpoints(tmp_path / "part" / "checkpoints")
    for later in saved[-4:]:  # 64 + 112 images are left: the middle of the second stage
        shutil.rmtree(later)
    assert int(saved[-5].name) == 64 + 112
    for bundle in (tmp_path / "part").glob("*.safetensors"):
        bundle.unlink()
    rest = run_cli(tmp_path, "train", "tiny.yaml", *often, "--out", "part")
    assert rest.returncode == 0, rest.stderr
    assert "resuming distill at 112 images" in rest.stderr
    first, second = (read_tensors(tmp_path / run / "distill.safetensors")[0] for run in ("whole", "part"))
    assert first.keys() == second.keys()
    assert same(first, second)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "part")]
    rates = [[(line["images"], line["learning_rate"]) for line in map(json.loads, run)] for run in lines]
    assert rates[0] == rates[1]


def test_a_distilled_model_is_sampled_with_the_steps_it_was_made_for(tmp_path):
    write_config(tmp_path / "tiny.yaml", "pd", duration_images=64)  # ends where the next stage would begin
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 0, run.stderr
    model = load(tmp_path / "run")
    assert (model.sampling.sampler, model.sampling.steps) == ("euler", 2)
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    assert sample(model, 2).isfinite().all()
    assert len(calls) == 2


def test_teacher_of_its_own_is_used_instead_of_the_starting_weights(tmp_path):
    write_config(tmp_path / "tiny.yaml", "cd")
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 0, run.stderr
    single = copy.deepcopy(config_of("cd", init="fresh", teacher=str(tmp_path / "run" / "pretrain.safetensors")))
    del single["phases"]["pretrain"]
    (tmp_path / "single.yaml").write_text(parse_config(single, "single").to_yaml())
    again = run_cli(tmp_path, "train", "single.yaml", "--out", "single")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"init": "fresh"}, "distils a teacher, and there is none"),
        ({"teacher": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ],
)
def test_a_missing_teacher_is_found_before_the_first_step(phase, message, tmp_path):
    write_config(tmp_path / "tiny.yaml", "cd", **phase)
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode in (2, 3)
    assert message in run.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_teacher_that_nobody_asked_for_is_refused(tmp_path):
    write_config(tmp_path / "tiny.yaml", "ict", teacher="some.safetensors")
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 2
    assert "has no use for a teacher" in run.stderr


def test_a_bundle_of_any_network_is_tuned_by_one_command(tmp_path):
    write_config(tmp_path / "tiny.yaml", "cd")
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "run").returncode == 0
    options = ["phases={tune: {objective: {kind: ect}, init: run/model.safetensors, duration_images: 32, batch_size: 16}}"]
    run = run_cli(tmp_path, "train", "digits", "network={family: bundle}", *options, "telemetry.evaluate=false", "--out", "ect")
    assert run.returncode == 0, run.stderr
    assert "model_channels: 8" in (tmp_path / "ect" / "config.yaml").read_text()
    missing = run_cli(tmp_path, "train", "digits", "network={family: bundle}", "--out", "none")
    assert missing.returncode == 2
    assert "names no bundle" in missing.stderr


def test_feature_distance_trains_with_weights_and_says_what_is_missing_without(tmp_path):
    write_config(tmp_path / "tiny.yaml", "ict", duration_images=16)
    distance = ["phases.distill.objective.distance=lpips", "features.lpips_resize=32"]
    without = run_cli(tmp_path, "train", "tiny.yaml", *distance, "--out", "run")
    assert without.returncode == 2
    assert "features.lpips" in without.stderr
    run = run_cli(tmp_path, "train", "tiny.yaml", *distance, "features.lpips=random", "--out", "run")
    assert run.returncode == 0, run.stderr
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["phase"] == "distill"
    assert line["loss"] > 0


def test_a_run_folder_is_a_start_and_a_teacher_and_another_teacher_is_another_run(tmp_path):
    write_config(tmp_path / "tiny.yaml", "cd", duration_images=32)
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "first").returncode == 0
    single = copy.deepcopy(config_of("cd", init="first/pretrain.safetensors", duration_images=32))
    del single["phases"]["pretrain"]
    (tmp_path / "single.yaml").write_text(parse_config(single, "single").to_yaml())
    shutil.copytree(tmp_path / "first", tmp_path / "folder")
    shutil.copy(tmp_path / "first" / "pretrain.safetensors", tmp_path / "folder" / "model.safetensors")
    run = run_cli(tmp_path, "train", "single.yaml", "phases.distill.init=folder", "--out", "second")
    assert run.returncode == 0, run.stderr
    other = run_cli(
        tmp_path,
        "train",
        "single.yaml",
        "phases.distill.init=folder",
        "phases.distill.teacher=first/pretrain.safetensors",
        "phases.distill.duration_images=64",
        "--out",
        "second",
    )
    assert other.returncode == 2
    assert "phases.distill.teacher was" in other.stderr


def test_a_consistency_model_is_no_teacher(tmp_path):
    write_config(tmp_path / "tiny.yaml", "cd", duration_images=16)
    assert run_cli(tmp_path, "train", "tiny.yaml", "--out", "first").returncode == 0
    write_config(tmp_path / "tiny.yaml", "cd", duration_images=16, teacher="first")
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "second")
    assert run.returncode == 2
    assert "is a consistency model" in run.stderr


def test_a_student_takes_the_place_of_a_teacher_that_knows_augmentation(tmp_path):
    config = config_of("pd", duration_images=64)
    config["phases"]["pretrain"] = {**config["phases"]["pretrain"], "augment": 0.12}
    write_path = tmp_path / "augmented.yaml"
    write_path.write_text(parse_config({**config, "phases": {"pretrain": config["phases"]["pretrain"]}}, "a").to_yaml())
    assert run_cli(tmp_path, "train", "augmented.yaml", "--out", "teacher").returncode == 0
    del config["phases"]["pretrain"]
    config["phases"]["distill"]["init"] = "teacher"
    (tmp_path / "pd.yaml").write_text(parse_config(config, "pd").to_yaml())
    run = run_cli(tmp_path, "train", "pd.yaml", "--out", "pd")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"kind": "ict", "mid_sigmas": [0.5, 0.8]}}, "must descend"),
        ({"objective": {"kind": "cd", "rho": 0.01}}, "rho"),
        ({"objective": {"kind": "cd", "target": "fixed"}}, "target_halflife_images"),
        ({"objective": {"kind": "pd", "start_steps": 7, "end_steps": 2}}, "never end_steps 2"),
        ({"objective": OBJECTIVES["pd"], "emas": {"main": {"kind": "power"}}, "ema_snapshot_images": 16}, "at each stage"),
        ({"augment": 0.1, "init": "previous"}, "is not told of augmentation"),
    ],
)
def test_options_that_cannot_work_are_named_before_the_first_step(change, message, tmp_path):
    config = config_of("cd")
    config["phases"]["distill"].update(change)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 2
    assert message in run.stderr


@pytest.mark.parametrize("kind", ["cd", "pd"])
def test_a_teacher_keeps_its_convolutions_in_the_dtype_they_are_used_in(kind):
    config = parse_config({**config_of(kind), "compute": {"dtype": "bfloat16"}}, "tiny")
    device = torch.device("cpu")
    data = load_resident(open_source("digits", "", labels=False), device=device)
    before = Phase(config, "pretrain", data, device, 0)
    before.start(None)
    phase = Phase(config, "distill", data, device, 0)
    phase.start(before.averaged_weights())
    phase._promote_student()
    student, teacher = phase.model.net.state_dict(), phase.networks.teacher.net.state_dict()
    assert {value.dtype for value in student.values()} == {torch.float32}
    assert {value.dtype for value in teacher.values() if value.ndim == 4} == {torch.bfloat16}
    assert all(torch.equal(value, student[name].to(value.dtype)) for name, value in teacher.items())
    phase.step()
    assert phase.meter.read()["loss"] > 0
    again = Phase(config, "distill", data, device, 0)
    again.load_tensors({name: value.clone() for name, value in phase.tensors().items()}, phase.images, Path("saved"))
    assert all(torch.equal(value, teacher[name]) for name, value in again.networks.teacher.net.state_dict().items())


def test_a_phase_that_ends_before_its_last_stage_says_so(tmp_path):
    write_config(tmp_path / "tiny.yaml", "pd", duration_images=48)
    run = run_cli(tmp_path, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 0, run.stderr
    assert "phases.distill ends at 2 steps, not at end_steps 1: 48 images hold too few stages of 32" in run.stderr


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path):
    config = config_of("pd")
    config["phases"]["distill"]["objective"] = {**OBJECTIVES["pd"], "sigma_min": 90.0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run = run_cli(tmp_path, "train", "tiny.yaml", "--dry-run")
    assert run.returncode == 2
    assert "phases.distill.objective: a grid needs 0 < sigma_min < sigma_max" in run.stderr
