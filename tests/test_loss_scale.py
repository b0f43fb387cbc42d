"""Training in fp16: the loss scale itself, and that it changes nothing but what would be lost."""

import json

import pytest
import torch
from conftest import run_cli
from recorded_calls import OperatorRecorder
from test_graphed_training import differing, phase_of, state_of
from test_training import TINY

from fastcm.config import parse_config
from fastcm.train.loss_scale import INITIAL, LARGEST, LossScale


def history(scale, *finite):
    values = []
    for each in finite:
        scale.update(torch.tensor(float(each)))
        values.append(scale.scale.item() / INITIAL)
    return values


def test_it_halves_after_a_step_left_out_and_doubles_after_enough_finite_ones_in_a_row():
    scale = LossScale(torch.device("cpu"), growth_interval=3)
    assert history(scale, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0) == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1]


def test_it_stays_between_one_and_its_largest_value():
    scale = LossScale(torch.device("cpu"), growth_interval=1)
    assert history(scale, *[1] * 40)[-1] * INITIAL == LARGEST
    assert history(scale, *[0] * 40)[-1] * INITIAL == 1.0


def gradients(name, monkeypatch, dtype, loss_scale, loss_factor=1.0):
    """Gradients of one step's loss, times a factor, divided by their loss scale again."""
    phase = phase_of(name, "cpu", None, monkeypatch, dtype=dtype)
    batch = phase.loader.batch(3 * 8)
    schedule = {key: torch.tensor(value) for key, value in phase.objective.schedule(0).items()}
    prepared = phase.gradient.prepare(batch, 3 * 8)
    phase.gradient.loss_scale = None if loss_scale is None else torch.tensor(loss_scale * loss_factor)
    phase.gradient(prepared, schedule)
    found = {name: p.grad for name, p in phase.model.net.named_parameters() if p.grad is not None}
    return {name: grad / (1.0 if loss_scale is None else loss_scale) for name, grad in found.items()}


@pytest.mark.parametrize("name", ["edm", "ect", "cd", "pd", "ctm", "ctm_gan"])
def test_a_scaled_gradient_is_the_gradient(name, monkeypatch):
    expected = gradients(name, monkeypatch, "float32", None)
    found = gradients(name, monkeypatch, "float32", 2.0**10)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6 * value.abs().max().item() + 1e-12)


def test_gradients_that_fp16_would_lose_survive():
    # As small as those of a loss that is nearly learned.
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny = 2.0**-24
        whole = gradients("ect", monkeypatch, "float32", 1.0, tiny)
        lost = gradients("ect", monkeypatch, "float16", 1.0, tiny)
        kept = gradients("ect", monkeypatch, "float16", 2.0**16, tiny)
    assert error_of(kept, whole) < 0.05
    assert error_of(lost, whole) > 0.5


def error_of(gradients, expected):
    """The norm of the difference of all gradients, relative."""
    difference = torch.stack([(gradients[key] - value).norm() for key, value in expected.items()]).norm()
    return (difference / torch.stack([value.norm() for value in expected.values()]).norm()).item()


@pytest.mark.parametrize("name", ["edm", "ect", "ctm"])
def test_fp16_steps_are_replayed_bit_for_bit(name, monkeypatch):
    recorder = OperatorRecorder()
    plain, graphed = (phase_of(name, "cpu", each, monkeypatch, dtype="float16") for each in (None, recorder))
    for phase in (plain, graphed):
        phase.loss_scale.scale.fill_(64.0)
        for _ in range(6):
            phase.step()
    assert recorder.num_replayed > 0
    assert differing(state_of(plain), state_of(graphed)) == []
    assert plain.meter.read()["loss"] > 0


def test_an_overflow_leaves_all_but_the_scale_as_it_is(monkeypatch):
    phase = phase_of("ect", "cpu", None, monkeypatch, dtype="float16")
    while not phase.loss_scale.finite_steps:
        phase.step()
    phase.meter.read()
    phase.loss_scale.scale.fill_(2.0**100)
    before = state_of(phase)
    phase.step()
    assert set(differing(before, state_of(phase))) == {"loss_scale/finite_steps", "loss_scale/scale", "meter"}
    assert phase.meter.read()["skipped_steps"] == 1
    assert (phase.loss_scale.scale.item(), phase.loss_scale.finite_steps.item()) == (LARGEST, 0.0)


def test_other_dtypes_have_no_scale(monkeypatch):
    for dtype in ("float32", "bfloat16"):
        phase = phase_of("ect", "cpu", None, monkeypatch, dtype=dtype)
        assert phase.loss_scale is None
        assert not any("loss_scale" in name for name in phase.tensors())


def test_a_run_in_fp16_logs_its_scale_and_resumes_bit_for_bit(tmp_path):
    (tmp_path / "tiny.yaml").write_text(parse_config({**TINY, "compute": {"dtype": "float16"}}, "tiny").to_yaml())
    same = ["phases.tune.optimizer.cooldown_images=0", "phases.tune.duration_images=320"]
    for name, *options in (["whole"], ["part", "phases.tune.duration_images=192"], ["part"]):
        run = run_cli(tmp_path, "train", "tiny.yaml", *same, *options, "--out", name)
        assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_scale"] >= 1.0 for line in lines)
    assert lines[0]["loss_scale"] > lines[-1]["loss_scale"]
    assert any(line["loss"] for line in lines[-4:])  # it found a scale that does not overflow
    one, two = ((tmp_path / name / "tune.safetensors").read_bytes() for name in ("whole", "part"))
    assert one == two


def test_a_phase_without_a_finite_step_is_no_success(tmp_path):
    (tmp_path / "tiny.yaml").write_text(parse_config({**TINY, "compute": {"dtype": "float16"}}, "tiny").to_yaml())
    run = run_cli(tmp_path, "train", "tiny.yaml", "phases.pretrain.duration_images=32", "--out", "run")
    assert run.returncode == 1
    assert "training diverged: no finite step" in run.stderr
    assert "all 2 steps left out, not finite, loss scale now 16384" in run.stderr
