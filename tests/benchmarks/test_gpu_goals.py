"""Goals against made-up results: reached, missed by how much, not measured; each goal reads what the report writes."""

import json
import sys

import pytest

from benchmarks.gpu import goals
from benchmarks.gpu.goals import GOALS, MAIN, beside, goal_lines, num_cases
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.size import FULL, GPU_TESTS
from benchmarks.gpu.table import markdown

DEVICE = "NVIDIA H200"


def row(op, direction, shape, backend, us, share=0.5, shapes="ddpmpp32", status="ok"):
    timing = {"median_us": us}
    head = {"op": op, "pass": direction, "shapes": shapes, "shape": shape, "backend": backend, "status": status}
    return {**head, "kernel": timing, "call": {"median_us": 99.0}, "copy_share": share}


def result(device=DEVICE, **parts):
    parts = {"environment": {"environment": {"device": device}}, **parts}
    return {"smoke": False, "parts": {name: {"status": "done", "error": None, "items": items} for name, items in parts.items()}}


def kernels(*made):
    return result(kernels={"x": {"rows": list(made)}, "broken": {"error": "no"}})


def outcomes(report, **further):
    return {name: (measured, outcome) for name, _, measured, outcome in goal_lines({"report": report, **further})}


def of(name, report, **further):
    return next(value for goal, value in outcomes(report, **further).items() if name in goal)


def test_nothing_measured_reads_so_everywhere():
    assert set(outcomes(result()).values()) == {("not measured", "-")}


def test_names_are_unique_and_each_has_one_bound():
    assert len({goal.name for goal in GOALS}) == len(GOALS)
    assert all((goal.least is None) != (goal.most is None) for goal in GOALS)


@pytest.mark.parametrize(("speed", "outcome"), [(2700.0, "reached"), (2630.0, "reached"), (2367.0, "missed by 10.0%")])
def test_a_speed_is_compared_with_its_goal(speed, outcome):
    report = result(**{"ect-128": {"fastcm triton": {"images_per_s": speed}}})
    assert of("in images/s", report)[1] == outcome


def test_an_absolute_goal_is_for_its_gpu_only():
    steps = {"fastcm triton": {"images_per_s": 900.0}, "eager tf32": {"images_per_s": 300.0}}
    lines = {line[0]: line for line in goal_lines({"report": result("NVIDIA A100", **{"ect-128": steps})})}
    assert lines["the same in images/s"][2:] == ("900", "the goal is for H200")
    assert next(line for name, line in lines.items() if "eager TF32" in name)[2:] == ("3", "reached")


def test_ratios_of_steps_need_both_and_no_error():
    steps = {"fastcm triton": {"images_per_s": 500.0}, "compiled bf16": {"images_per_s": 500.0}, "eager tf32": {"error": "no"}}
    report = result(
        **{"ect-128": steps, "peers": {"fastcm triton": {"images_per_s": 400.0}, "ect tf32": {"images_per_s": 100.0}}}
    )
    assert of("compiled channels_last", report) == ("1", "missed by 9.1%")
    assert of("eager TF32", report) == ("not measured", "-")
    assert of("official step", report) == ("4", "reached")
    assert of("FastGen", report) == ("not measured", "-")


def test_the_worst_main_shape_counts_and_a_failed_kernel_is_no_measurement():
    assert num_cases("group_norm", ("fwd",), MAIN) == 2
    made = [
        row("group_norm", "fwd", f"{MAIN}{flags}", "triton", 30.0, share)
        for flags, share in (("g32", 0.93), ("g32 silu", 0.95))
    ]
    made.append(row("group_norm", "fwd", "512x8x8 g32", "triton", 30.0, 0.2))
    assert of("group norm forward", kernels(*made)) == ("0.93", "reached")
    made[0]["status"] = "failed"
    assert of("group norm forward", kernels(*made)) == ("0.95", "reached on 1 of 2 shapes, the others were not measured")
    made[1]["copy_share"] = 0.45
    assert of("group norm forward", kernels(*made)) == ("0.45", "missed by 50.0%")


def test_the_best_other_backend_counts():
    made = [row("attention", "fwd", "T256 h1 d256", name, us) for name, us in (("triton", 20.0), ("sdpa-flash", 30.0))]
    assert of("best SDPA", kernels(*made))[0] == "1.5"
    made += [row("attention", "fwd", "T256 h1 d256", "sdpa-cudnn", 10.0), row("attention", "fwd", "T256 h1 d256", "torch", 1.0)]
    assert of("best SDPA", kernels(*made)) == ("0.5", "missed by 50.0%")
    assert (
        of("math path", kernels(row("attention", "jvp", "T64", "triton", 5.0), row("attention", "jvp", "T64", "torch", 15.0)))[
            0
        ]
        == "3"
    )


def test_the_optimizer_is_compared_with_a_copy_of_its_bytes():
    assert of("optimizer", kernels(row("optimizer", "fwd", "adam 55", "triton", 9.0, 0.8)))[0] == "1.25"
    assert of("optimizer", kernels(row("optimizer", "fwd", "adam 55", "triton", 9.0, 0.5))) == ("2", "missed by 53.8%")


def test_the_step_is_compared_with_its_convolutions_alone():
    conv = {"batch": 64, "fprop_ms": 5.0, "dgrad_ms": 6.0, "wgrad_ms": 7.0}
    step = {"batch": 128, "images_per_s": 1.0, "step_ms": {"median": 92.0}}
    report = result(ceilings={"conv ddpmpp32": conv}, **{"ect-128": {"fastcm triton": step}})
    assert of("convolution ceiling", report) == ("0.5", "missed by 9.1%")


def test_counts_must_be_zero():
    tests = {name: {"summary": "3 passed"} for name in GPU_TESTS}
    assert of("GPU tests", result(correctness=tests)) == ("0", "reached")
    assert of("GPU tests", result(correctness=tests | {GPU_TESTS[1]: {"error": "1 failed"}})) == ("1", "missed")
    assert of("compute-sanitizer", result(), sanitize={"failed": 0}) == ("0", "reached")


@pytest.mark.parametrize("value", [{"summary": "3 passed"}, {"error": "1 failed"}])
def test_tests_that_did_not_all_run_are_no_measurement(value):
    assert of("GPU tests", result(correctness={GPU_TESTS[0]: value})) == ("not measured", "-")
    assert of("GPU tests", result(correctness=dict.fromkeys(GPU_TESTS[1:], value))) == ("not measured", "-")


def test_a_value_of_another_commit_than_the_report_says_so():
    report = result()
    report["parts"]["environment"]["items"]["environment"]["commit"] = "abc"
    other = {"failed": 0, "environment": {"commit": "def+"}}
    assert of("compute-sanitizer", report, sanitize=other) == ("0", "reached (sanitize at commit def+, report at abc)")
    assert of("compute-sanitizer", report, sanitize=other | {"environment": {"commit": "abc"}}) == ("0", "reached")
    training = {"stages": {"train": {"seconds": 1320.0}}, "environment": {"commit": "abc"}}
    found = outcomes(result(), training=training, sanitize=other)["cifar10_20min: minutes of training"]
    assert found == ("22", "missed by 10.0% (training at commit abc, report at unknown)")


def test_a_sampler_is_compared_with_its_kernels():
    sampler = {"fastcm triton, 1 steps, batch 1": {"call": {"median_us": 6000.0}, "kernel_ms": 4.0}}
    assert of("1-step sampling", result(sampler=sampler)) == ("1.5", "missed by 25.0%")


def test_the_training_has_its_own_file_beside_the_report(tmp_path, monkeypatch, capsys):
    report = tmp_path / "nvidia-h200-2026-01-02.json"
    report.write_text(json.dumps(result()))
    for date, seconds in (("2026-01-01", 60.0), ("2026-01-03", 1320.0)):
        path = tmp_path / f"nvidia-h200-cifar10-20min-{date}.json"
        path.write_text(json.dumps({"stages": {"train": {"seconds": seconds}}}))
    (tmp_path / "other-cifar10-20min-2026-01-09.json").write_text("{}")
    assert of("cifar10_20min", result(), **beside(report)) == ("22", "missed by 10.0%")
    monkeypatch.setattr(sys, "argv", ["goals", str(report)])
    goals.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if "cifar10_20min" in line)
    assert line.split("training")[1].split() == ["at", "most", "20", "22", "missed", "by", "10.0%"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        ("# fastcm", "expected a file that python -m benchmarks.gpu_report has written"),
        ("[]", "no report of a GPU, which has the keys 'smoke' and 'parts'"),
        ('{"smoke": true, "parts": {}}', "is a smoke report of a CPU at toy size: its numbers mean nothing"),
    ],
)
def test_a_file_that_is_no_report_of_a_gpu_is_a_usage_error(text, reason, tmp_path, monkeypatch, capsys):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["goals", str(path)])
    with pytest.raises(SystemExit) as ended:
        goals.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert str(path) in printed.err
    assert reason in printed.err
    assert printed.out == ""


def test_the_markdown_of_a_report_begins_with_the_goals():
    report, training = {"smoke": False, "parts": {}}, {"stages": {"train": {"seconds": 1320.0}}}
    assert "## Goals\n\n| goal | wanted | measured | outcome |" in markdown(report)
    assert "| at most 20 | 22 | the goal is for H200 |" in markdown(report, {"training": training})
    assert "Goals" not in markdown(report | {"smoke": True})


def test_goals_read_items_that_the_report_has():
    assert set(GPU_TESTS) == {name for name, _ in PARTS["correctness"](FULL)}
    items = {part: [name for name, _ in PARTS[part](FULL)] for part in ("ect-128", "ceilings", "sampler")}
    assert {"fastcm triton", "eager tf32", "compiled bf16"} <= set(items["ect-128"])
    assert "conv ddpmpp32" in items["ceilings"]
    assert "fastcm triton, 1 steps, batch 1" in items["sampler"]
