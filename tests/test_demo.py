"""The main job itself: the demo's command on the real digits, judged by its own figures."""

import json

import pytest

# Multiples of the distance between real images, and of the one between real images and noise.
LIMITS = {"35-evaluation Heun": 2.0, "2 steps": 3.0, "1 step": 5.0}


@pytest.mark.slow
def test_demo_turns_real_digits_into_a_one_step_generator(fastcm_cli, tmp_path):
    run = fastcm_cli("train", "digits", "--out", "demo", timeout=1800)
    assert run.returncode == 0, run.stderr
    distances = json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    real, noise = distances["real against real"], distances["untrained noise"]
    for name, limit in LIMITS.items():
        assert f"{name:<24}{distances[name]:10.3f}" in run.stdout
        assert distances[name] <= limit * real, distances
        assert distances[name] < noise / 10, distances
    for line in ("compare:", "pictures:", "report:", "model:"):
        assert line in run.stdout
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 1000
    check_that_evaluating_again_renews_the_report(fastcm_cli, tmp_path / "demo", distances)


def check_that_evaluating_again_renews_the_report(fastcm_cli, run, distances):
    (run / "report.html").unlink()
    (run / "evaluation.json").unlink()
    again = fastcm_cli("evaluate", run)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "evaluation.json").read_text()) == pytest.approx(distances)
    assert f"{distances['2 steps']:.3f}" in (run / "report.html").read_text()
