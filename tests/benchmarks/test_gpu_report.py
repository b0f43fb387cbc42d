"""The GPU report without a GPU: what happens to parts that fail or hang, resuming, and every part at toy size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.baselines import contestants
from benchmarks.gpu import parts, steps
from benchmarks.gpu.parts import PARTS, run_part
from benchmarks.gpu.size import FULL, GPU_TESTS, SMOKE
from benchmarks.gpu.table import markdown
from fastcm.bench.report import as_json
from fastcm.config import load_config
from fastcm.errors import ConfigError

ROOT = Path(__file__).parents[2]

# A part as a script: writes one line per item that is not done, then does what the part is called.
SCRIPT = """
import json, sys, time
part, lines, done = sys.argv[1], sys.argv[2], sys.argv[3:]
with open(lines, "a") as file:
    for item in ("one", "two"):
        if item not in done:
            broken = part == "breaks" and item == "two"
            file.write(json.dumps({"item": item, **({"error": "no"} if broken else {"value": part}), "done": done}) + chr(10))
            file.flush()
    if part == "hangs":
        file.write('{"item": "cut o')
        file.flush()
        time.sleep(600)
if part == "crashes":
    print("last words")
    sys.exit(3)
"""


def command(part, lines, done):
    return [sys.executable, "-c", SCRIPT, part, str(lines), *done]


def run(limits, result, seconds=60.0, save=lambda result: None):
    gpu_report.run_report(limits, result, command, save, seconds)
    return {name: part["status"] for name, part in result["parts"].items()}


def empty():
    return {"format": gpu_report.FORMAT, "smoke": True, "parts": {}}


def test_a_part_that_fails_or_hangs_keeps_what_it_had_and_the_rest_goes_on():
    result, saved = empty(), []
    limits = {"fine": 30.0, "crashes": 30.0, "hangs": 2.0, "breaks": 30.0, "last": 30.0}
    states = run(limits, result, save=lambda value: saved.append(as_json(value)))
    assert states == {"fine": "done", "crashes": "failed", "hangs": "timed out", "breaks": "failed", "last": "done"}
    parts = result["parts"]
    assert parts["crashes"]["error"] == "ended with code 3: last words"
    assert parts["hangs"]["error"] == "stopped after 2 s"
    assert 2.0 <= parts["hangs"]["seconds"] < 8.0
    assert parts["breaks"]["error"] == "two"
    for part in parts.values():
        assert set(part["items"]) == {"one", "two"}
    assert [list(json.loads(text)["parts"]) for text in saved] == [list(limits)[: n + 1] for n in range(len(limits))]


def test_a_second_run_repeats_only_what_is_missing():
    result = empty()
    run({"fine": 30.0, "breaks": 30.0, "hangs": 1.5}, result)
    fine = json.dumps(result["parts"]["fine"])
    result["parts"]["hangs"]["items"].pop("two")
    states = run({"fine": 30.0, "breaks": 30.0, "hangs": 1.5}, result)
    assert states == {"fine": "done", "breaks": "failed", "hangs": "timed out"}
    assert json.dumps(result["parts"]["fine"]) == fine
    assert result["parts"]["breaks"]["items"]["two"]["done"] == ["one"]  # the item with the error, and only that, again
    assert result["parts"]["hangs"]["items"]["one"]["done"] == []
    assert result["parts"]["hangs"]["items"]["two"]["done"] == ["one"]
    assert result["parts"]["hangs"]["seconds"] > 2.5


def test_what_was_unavailable_is_tried_again_though_its_part_is_done():
    result = empty()
    run({"fine": 30.0}, result)
    result["parts"]["fine"]["items"]["two"] = {"unavailable": "not installed"}
    assert run({"fine": 30.0}, result) == {"fine": "done"}
    assert result["parts"]["fine"]["items"]["two"] == {"value": "fine", "done": ["one"]}


def test_no_part_starts_when_the_time_is_up():
    result = empty()
    states = run({"hangs": 1.0, "fine": 30.0}, result, seconds=1.5)
    assert states == {"hangs": "timed out", "fine": "not started"}
    assert run({"hangs": 1.0, "fine": 30.0}, result) == {"hangs": "timed out", "fine": "done"}


def test_a_part_is_killed_with_its_children(tmp_path):
    mark = tmp_path / "pid"
    inner = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    result = empty()
    gpu_report.run_report(
        {"outer": 3.0}, result, lambda *arguments: [sys.executable, "-c", outer], lambda value: None, seconds=30.0
    )
    assert result["parts"]["outer"]["status"] == "timed out"
    child = int(mark.read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives")


def test_a_file_of_another_kind_is_not_touched(tmp_path, capsys):
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"format": 0, "smoke": true, "parts": {}}', '{"format": 1, "smoke": false, "parts": {}}'):
        path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            gpu_report.read_result(path, smoke=True)
        assert ended.value.code == 2
        assert "x.json" in capsys.readouterr().err
        assert path.read_text() == text


def report(tmp_path, *arguments, timeout=120):
    """The program as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "benchmarks.gpu_report", "--out", str(tmp_path / "r.json"), *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_git_ignores_what_a_smoke_run_writes():
    path = gpu_report.default_path(smoke=True)
    for name in (path, path.with_suffix(".md")):
        assert subprocess.run(["git", "check-ignore", "-q", str(name)], cwd=ROOT, check=False).returncode == 0


def test_without_a_gpu_it_ends_with_code_2_and_one_line(tmp_path):
    done = report(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "gpu_report: error: no CUDA device here; --smoke tries every part on the CPU\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_ends_with_code_2(tmp_path):
    done = report(tmp_path, "--smoke", "--only", "kernels,weather")
    assert done.returncode == 2
    assert "no part weather" in done.stderr


@pytest.mark.parametrize("word", ["weather=x", "ect", "ect="])
def test_an_unknown_peer_ends_with_code_2(word, tmp_path):
    done = report(tmp_path, "--smoke", "--peer", word)
    assert done.returncode == 2
    assert "expected NAME=PATH with a name of ect, fastgen, diffusers" in done.stderr


def test_the_program_writes_json_and_markdown_and_resumes(tmp_path):
    assert report(tmp_path, "--smoke", "--only", "environment").returncode == 0
    first = json.loads((tmp_path / "r.json").read_text())
    assert first["parts"]["environment"]["items"]["environment"]["device"] == "cpu"
    assert "these numbers mean nothing" in (tmp_path / "r.md").read_text()
    done = report(tmp_path, "--smoke", "--only", "environment,correctness")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "environment (at most" not in done.stdout
    second = json.loads((tmp_path / "r.json").read_text())
    assert second["parts"]["environment"] == first["parts"]["environment"]
    (result,) = second["parts"]["correctness"]["items"].values()
    assert "passed" in result["summary"]


def test_every_file_with_tests_for_a_gpu_is_part_of_the_report():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark." + "gpu" in path.read_text(encoding="utf-8")]
    assert sorted(path.relative_to(ROOT).as_posix() for path in marked) == sorted(GPU_TESTS)


def test_parts_and_limits_are_the_same_and_fit_into_the_time():
    assert list(gpu_report.LIMITS) == list(PARTS)
    assert sum(gpu_report.FIRST_CALL.values()) <= 60 * gpu_report.MINUTES <= 9 * 60
    assert set(gpu_report.LIMITS) - set(gpu_report.FIRST_CALL) == {"sampler", "breakdown", "peers", "compile-modes"}
    assert all(limit <= 60 * gpu_report.MINUTES for limit in gpu_report.LIMITS.values())
    assert {name for name in PARTS if name.split("-")[0] in ("ect", "edm")} == {"ect-128", "ect-512", "edm-128", "edm-512"}


def test_the_second_call_goes_on_with_what_the_first_has_no_time_for():
    first, result = list(gpu_report.FIRST_CALL), empty()
    assert gpu_report.due_parts(result) == first
    result["parts"] = {part: {"status": gpu_report.TIMED_OUT, "items": {}} for part in first}
    result["parts"][first[-1]]["status"] = gpu_report.NOT_STARTED
    assert gpu_report.due_parts(result) == first
    result["parts"][first[-1]]["status"] = gpu_report.DONE
    assert gpu_report.due_parts(result) == list(gpu_report.LIMITS)


def test_a_call_of_the_program_runs_the_parts_that_are_due_and_says_which_are_left(tmp_path, monkeypatch, capsys):
    ran = []

    def part(name, items, command, limit):
        ran.append(name)
        return {"status": "done", "error": None, "items": {"one": {"unavailable": "a stand-in"}}}

    monkeypatch.setattr(gpu_report, "run_part", part)
    monkeypatch.setattr(gpu_report, "markdown", lambda *arguments: "")
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--smoke", "--out", str(tmp_path / "r.json")])
    gpu_report.main()
    assert ran == list(gpu_report.FIRST_CALL)
    left = "not measured yet: sampler, breakdown, peers, compile-modes; the same command goes on with them"
    assert left in capsys.readouterr().out
    gpu_report.main()
    assert ran[len(gpu_report.FIRST_CALL) :] == list(gpu_report.LIMITS)
    assert "not measured yet" not in capsys.readouterr().out


def items_of(part, done=()):
    lines = []
    run_part(part, SMOKE, set(done), lines.append)
    return {line["item"]: line for line in json.loads(as_json(lines), parse_constant=pytest.fail)}


@pytest.mark.parametrize("part", ["environment", "ceilings", "sampler", "training"])
def test_every_part_runs_at_toy_size(part):
    items = items_of(part)
    assert [name for name, item in items.items() if "error" in item] == []
    text = markdown({"smoke": True, "parts": {part: {"status": "done", "error": None, "items": items}}})
    assert text.count("\n|") > 2


def test_a_sampler_has_the_sum_of_its_kernels_beside_the_time_of_a_call():
    name = "fastcm torch, 1 steps, batch 1"
    value = items_of("sampler", done=[item for item, _ in parts.PARTS["sampler"](SMOKE) if item != name])[name]
    assert 0 < value["kernel_ms"] < 10 * value["call"]["median_us"] / 1e3
    assert value["images_per_s"] == pytest.approx(1e6 / value["call"]["median_us"])


def test_the_kernel_part_checks_every_op_and_pass():
    items = items_of("kernels")
    assert "| attention | jvp |" in markdown(
        {"smoke": True, "parts": {"kernels": {"status": "done", "error": None, "items": items}}}
    )
    rows = [row for item in items.values() for row in item["rows"]]
    assert {(row["op"], row["pass"]) for row in rows} == {(op, d) for op, ds in parts.OP_PASSES.items() for d in ds}
    assert {row["status"] for row in rows if row["backend"] == "torch"} == {"ok"}


def test_the_step_part_measures_every_contestant():
    items = items_of("ect-128")
    assert list(items) == ["fastcm torch", "fastcm torch, graph off", "compiled bf16", "eager fp32", "eager tf32"]
    assert {name: item.get("error") for name, item in items.items()} == dict.fromkeys(items)
    for item in items.values():
        assert item["images_per_s"] == pytest.approx(2 / (item["step_ms"]["median"] / 1e3))
        assert item["step_ms"]["p20"] <= item["step_ms"]["median"] <= item["step_ms"]["p80"]
        assert item["kernels"] > 100
    modes = {name: (item["dtype"], item["tf32"], item["compiled"], item["cuda_graph"]) for name, item in items.items()}
    assert modes["fastcm torch"] == modes["fastcm torch, graph off"] == ("float32", True, False, False)
    assert modes["compiled bf16"] == ("bfloat16", False, True, False)
    assert (modes["eager fp32"], modes["eager tf32"]) == (("float32", False, False, False), ("float32", True, False, False))
    losses = [item["loss"] for item in items.values()]
    assert max(losses) < 1e4
    text = markdown({"smoke": True, "parts": {"ect-128": {"status": "done", "error": None, "items": items}}})
    assert "times as fast as | compiled bf16" in text


def test_the_breakdown_splits_the_step_of_ours_and_of_the_compiled_baseline():
    items = items_of("breakdown")
    assert list(items) == ["fastcm torch", "compiled bf16"]
    for item in items.values():
        assert sum(entry["kernels"] for entry in item["categories"].values()) == pytest.approx(item["kernels"], rel=0.05)
        assert item["busy_ms"] > 0
        assert item["costs"]["norm"]["bytes"] > 1000
        assert item["shapes"] == "digits8"


def variant(batch, dtype, mode, graph):
    return f"{dtype}, {mode}, graph {graph}, batch {batch}"


def test_variants_that_the_configuration_does_not_allow_say_why(monkeypatch):
    def refuse(*arguments):
        raise ConfigError("compute.dtype: expected 'float32' or 'bfloat16'")

    monkeypatch.setattr(steps.Setup, "config", refuse)
    items = items_of("compile-modes")
    assert list(items) == [variant(*values) for values in steps.VARIANTS]
    for name, item in items.items():
        wanted = "a device of type cpu has no CUDA graphs" if "graph on" in name else "compute.dtype: expected"
        assert item["unavailable"].startswith(wanted)


def test_a_variant_is_built_with_its_options_under_its_mode(monkeypatch):
    seen = []

    def measured_step(setup, size, contestant, kernels):
        seen.append((setup.batch_size, torch._inductor.config.max_autotune, contestant.make()))
        return {}

    monkeypatch.setattr(steps, "measured_step", measured_step)
    monkeypatch.setattr(contestants, "ours", lambda setup, dtype, compiled, *options: SimpleNamespace(step=(dtype, *options)))
    monkeypatch.setattr(steps.Setup, "config", lambda *arguments: load_config("digits"))
    assert all("error" not in item for item in items_of("compile-modes").values())
    assert seen == [
        (batch // SMOKE.step_divisor, "max-autotune" in mode, (dtype, f"compute.cuda_graph='{graph}'"))
        for batch, dtype, mode, graph in steps.VARIANTS
        if graph == "off"
    ]


def test_done_items_are_not_measured_again():
    assert list(items_of("ceilings", done=["copy", "conv digits8"])) == ["matmul bf16"]


def test_an_item_that_fails_is_written_with_its_error_and_the_rest_goes_on(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("no luck")

    monkeypatch.setattr(parts, "product_rate", broken)
    items = items_of("ceilings")
    assert items["matmul bf16"]["error"] == "RuntimeError: no luck"
    assert "rows" in items["conv digits8"]
    assert "no luck" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(steps, "_loss", lambda step: float("nan"))
    done = [name for name, _ in PARTS["ect-128"](SMOKE) if name != "eager fp32"]
    assert "the loss after" in items_of("ect-128", done=done)["eager fp32"]["error"]


def test_failing_tests_fail_the_part():
    with pytest.raises(RuntimeError, match="pytest ended with"):
        parts._pytest(("tests/no_such_file.py",))


def test_the_full_size_has_everything_the_smoke_size_has():
    assert set(SMOKE.backends) < set(FULL.backends)
    assert set(SMOKE.kernel_backends) < set(FULL.kernel_backends)
    assert (FULL.compiled, FULL.step_divisor, FULL.device.type) == (True, 1, "cuda")
    full = [name for name, _ in PARTS["kernels"](FULL)]
    assert full.index("adm64 optimizer fwd") < min(i for i, name in enumerate(full) if name.endswith(", compile"))
    assert len(full) == len(set(full))


def test_markdown_says_what_failed_and_shows_ratios():
    step = {"batch": 4, "step_ms": {"median": 2.0, "p20": 1.0, "p80": 3.0, "n": 5}, "peak_memory_bytes": 2**31, "launches": 3}
    step |= {"kernels": 9, "kernel_ms": 1.5, "warm_up_s": 1.0}
    items = {
        "eager tf32": {**step, "images_per_s": 100.0, "dtype": "float32", "tf32": True, "compiled": False, "cuda_graph": False},
        "fastcm triton": {**step, "images_per_s": 350.0, "dtype": "bfloat16", "compiled": True, "cuda_graph": True},
        "fastcm torch": {"error": "out of memory"},
    }
    parts = {"ect-128": {"status": "failed", "error": "fastcm torch", "items": items}}
    parts["kernels"] = {"status": "not started", "error": "the whole report was out of time", "items": {}}
    text = markdown({"smoke": False, "parts": parts})
    assert "mean nothing" not in text
    assert "- fastcm torch: out of memory" in text
    assert "| fastcm triton | 3.50 |" in text
    assert "**not started**: the whole report was out of time" in text
    assert "Measured by `python -m benchmarks.gpu_report`." in text
    assert "| eager tf32, batch 4 | float32, TF32 | no | no | 100 |" in text
    assert "| fastcm triton, batch 4 | bfloat16 | yes | yes | 350 |" in text
    assert "| 2.00 | 1.00-3.00 | 2.00 | 3 | 9 | 1.50 | 1.0 |" in text


def test_only_a_gpu_has_launches():
    from benchmarks.measuring.step_time import count_kernels

    counts = count_kernels(lambda: torch.ones(3) + 1, torch.device("cpu"))
    assert counts["launches"] == 0
    assert {"aten::add", "aten::ones"} <= {entry["name"] for entry in counts["top"]}
