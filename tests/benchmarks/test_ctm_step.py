"""The literal CTM step is the same step: equal losses and gradients, more passes."""

import json
import sys

import pytest
import torch

from benchmarks import ctm_step
from benchmarks.baselines.ctm_literal import LiteralStep, plain_name
from benchmarks.ctm_step import OurStep, build_phase, count_passes, draw, networks_of
from fastcm.random import Stream

CPU = torch.device("cpu")
STEPS = 2


@pytest.fixture(scope="module")
def contestants():
    phase = build_phase("tiny", 3, CPU)
    for number, model in enumerate(phase.networks[:3]):  # layers that start at zero would hide what comes before them
        with torch.no_grad():
            for name, p in model.net.named_parameters():
                p.add_(0.05 * Stream(number, f"test/{name}").normal(torch.zeros(1, dtype=torch.int64), tuple(p.shape))[0])
    return LiteralStep(phase), OurStep(phase), draw(phase, STEPS)


def gradients_of(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=1e-4 * gradient.abs().max().item() + 1e-7)


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_students_gradient_is_the_same(contestants, adversarial):
    literal, ours, draws = contestants
    literal.student.zero_grad()
    ours.phase.model.zero_grad()
    literal.generator_step(draws, adversarial)
    loss_N = ours.generator_step(draws, adversarial)
    expected = literal.distance(literal.estimate(draws), literal.target(literal.solve(draws), draws))
    assert loss_N.mean().item() == pytest.approx(expected.item(), rel=1e-3)
    found = {plain_name(name): gradient for name, gradient in gradients_of(ours.phase.model.net).items()}
    assert_close(found, gradients_of(literal.student))


def test_the_discriminators_gradient_is_the_same(contestants):
    literal, ours, draws = contestants
    heads = ours.phase.adversary.discriminator.heads
    found = []
    for step in (literal, ours):
        heads.zero_grad()
        step.discriminator_step(draws)
        found.append({name: gradient.clone() for name, gradient in gradients_of(heads).items()})
    assert_close(found[1], found[0])


def test_parts_do_what_they_say(contestants):
    literal, ours, draws = contestants
    one, two = literal.parts(draws), ours.parts(draws)
    assert one.keys() == two.keys()
    for name in ("teacher", "target"):
        torch.testing.assert_close(two[name](), one[name](), rtol=1e-3, atol=1e-3)
    for name in ("estimate", "denoising"):
        literal.student.zero_grad()
        ours.phase.model.zero_grad()
        one[name]()
        two[name]()
        trunk = {plain_name(n): g for n, g in gradients_of(ours.phase.model.net).items() if "aux_conv" not in n}
        expected = {n: g for n, g in gradients_of(literal.student).items() if "aux_conv" not in n}
        if name == "denoising":  # a sum in theirs is a mean, and ours is of each image
            expected = {n: 3 * g for n, g in expected.items()}
        assert_close(trunk, expected)


def test_passes_are_counted_by_network_and_kind(contestants):
    literal, ours, draws = contestants
    unit = sum(count_passes(lambda: literal.solve(draws), networks_of(literal)).values()) / (2 * STEPS)
    work = [count_passes(lambda: step.generator_step(draws, True), networks_of(step)) for step in (literal, ours)]  # noqa: B023
    for counts, onward in zip(work, (4, 2), strict=True):  # backward through the average: two weights of two gradients, a total
        passes = {key: value / unit for key, value in counts.items()}
        assert passes["teacher", "forward"] == 2 * STEPS
        assert passes["student", "forward"] == pytest.approx(3)  # target, estimate, denoising
        assert passes["average", "forward"] == pytest.approx(2)
        assert passes["average", "to input"] == pytest.approx(onward)
        assert passes["student", "to weights"] == pytest.approx(2, rel=0.03)
        assert ("average", "to weights") not in passes
        assert ("teacher", "to input") not in passes
    assert work[0]["LPIPS", "to input"] == 3 * work[1]["LPIPS", "to input"]
    assert work[0]["discriminator heads", "to input"] == 2 * work[1]["discriminator heads", "to input"]


def test_the_tool_writes_a_row_for_each_part(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    options = ["--size", "tiny", "--batch-size", "2", "--solver-steps", "1", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["ctm_step", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ctm_step.main()
    found = json.loads(path.read_text())
    assert [row["part"] for row in found["rows"]][-1] == "discriminator's step"
    for row in found["rows"]:
        seconds = row["seconds"]
        assert row["ratio"] == {"fastcm": pytest.approx(seconds["literal"] / seconds["fastcm"])}
        assert row["predicted"] >= 0.99
    printed = capsys.readouterr().out
    assert printed.count("predicted") == len(found["rows"])
    assert "average, to input: 4.00 against 2.00 passes of the U-Net" in printed
