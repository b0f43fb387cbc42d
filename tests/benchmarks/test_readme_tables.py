"""Numbers of the documents come from result files: no region differs from its file, and outside the regions there are none."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import digits_demo, readme_tables
from benchmarks.measuring.result_file import write_result
from benchmarks.readme_tables import REGION, TABLES, documents, newest_results, rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# Numbers that are no measurements: code, links and papers, versions, settings.
NO_MEASUREMENTS = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|Apache-2\.0|(?:Python|torch|CUDA|Triton) \d+\.\d+|gamma \d(?:, \d\.\d)?",
    re.DOTALL,
)
UNITS = r"(?:x|%|min|ms|us|s|hours?|minutes?|seconds?|images/s|[GT]B/s|TFLOP(?:/s)?|times)"
MEASURED = re.compile(rf"\d+\.\d+|\b\d[\d,]*\s?{UNITS}(?![\w-])")


def measured_outside(text: str) -> list[str]:
    """Numbers outside of regions that look like something measured."""
    return MEASURED.findall(NO_MEASUREMENTS.sub("", REGION.sub("", text)))


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_every_region_is_what_its_result_file_says(path):
    text = path.read_text(encoding="utf-8")
    assert rewrite(text, RESULTS) == text


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_no_measured_number_stands_outside_of_a_region(path):
    assert measured_outside(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    ["| 2 | 0.368 |", "2,630 images/s", "took 1 min 47 s", "within 12 minutes", "3 times as fast", "1.5x", "90 % of it", "5x"],
)
def test_a_number_without_a_file_is_noticed(text):
    assert measured_outside(f"intro\n<!-- numbers: digits -->\n0.1\n<!-- end of numbers -->\n{text}\n")


@pytest.mark.parametrize(
    "text", ["1,797 digits", "(arXiv 2206.00364)", "torch 2.14", "35 evaluations", "`0.5x`", "2 steps", "8x8"]
)
def test_numbers_that_nobody_measured_are_left_alone(text):
    assert measured_outside(text) == []


def test_readme_has_every_table():
    assert {name for _, name, _, _ in REGION.findall((ROOT / "README.md").read_text(encoding="utf-8"))} == set(TABLES)


def test_notes_name_the_result_files_of_their_outcomes_or_say_that_there_are_none():
    for section in (RESULTS.parent / "NOTES.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        files = re.findall(r"`results/([^`]+)`", section)
        assert all(any(RESULTS.glob(name)) for name in files), section
        if "| outcome |" in section:
            assert files or "no result file" in section or not measured_outside(outcomes(section)), section


def outcomes(section: str) -> str:
    """The cells of a section's tables in the column "outcome", without those that say "not measured"."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in section.splitlines() if line.startswith("| ")]
    column = rows[0].index("outcome")
    return "\n".join(row[column] for row in rows[1:] if not row[column].startswith("not measured"))


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def step_result(config, ratio, commit="abc"):
    return {
        "environment": {"processor": "p", "threads": 2, "packages": {"torch": "2.14.1"}, "commit": commit},
        "config": config,
        "batch_size": 4,
        "rows": [{"objective": "EDM", "ratio": ratio}, {"objective": "ECT", "ratio": 2.0}],
    }


def document(table):
    return f"before\n<!-- numbers: {table} -->\nold\n<!-- end of numbers -->\nafter\n"


def test_the_newest_file_of_each_name_is_shown(tmp_path):
    write(tmp_path, "cpu-step-digits-2026-01-31.json", step_result("digits", 1.5))
    write(tmp_path, "cpu-step-digits-2026-02-01.json", step_result("digits", 1.25))
    write(tmp_path, "cpu-step-other-2025-12-01.json", step_result("other", 0.5))
    write(tmp_path, "cpu-step-digits.json", step_result("digits", 9.0))  # without a date
    text = rewrite(document("cpu-step"), tmp_path)
    assert "| `digits`, 4 | 1.25 | 2.00 |\n| `other`, 4 | 0.50 | 2.00 |" in text
    names = "`benchmarks/results/cpu-step-digits-2026-02-01.json`,\n`benchmarks/results/cpu-step-other-2025-12-01.json`\n"
    assert f"Measured on p, 2 threads, torch 2.14.1:\n{names}" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of numbers -->\nafter\n")
    assert "old" not in text
    assert rewrite(text, tmp_path) == text


def test_results_of_two_places_say_which_is_which(tmp_path):
    other = step_result("other", 0.5)
    other["environment"]["processor"] = "o"
    write(tmp_path, "cpu-step-digits-2026-02-01.json", step_result("digits", 1.25))
    write(tmp_path, "cpu-step-other-2026-02-01.json", other)
    text = rewrite(document("cpu-step"), tmp_path)
    for name, processor in (("digits", "p"), ("other", "o")):
        assert f"on {processor}, 2 threads, torch 2.14.1:\n`benchmarks/results/cpu-step-{name}-2026-02-01.json`\n" in text


def test_a_file_without_its_place_is_named_alone(tmp_path):
    result = step_result("digits", 1.25)
    del result["environment"]
    write(tmp_path, "cpu-step-digits-2026-02-01.json", result)
    assert "2.00 |\n\n`benchmarks/results/cpu-step-digits-2026-02-01.json`\n<!--" in rewrite(document("cpu-step"), tmp_path)


def test_the_gain_at_the_boundary_is_a_ratio_with_its_place(tmp_path):
    result = step_result("digits", 1.0) | {"q": 2.0, "ratio": 1.5}
    write(tmp_path, "cpu-ect-boundary-digits-q2-2026-02-01.json", result)
    text = rewrite(document("cpu-boundary"), tmp_path)
    assert "| network, batch | q | times as fast |\n| --- | --- | --- |\n| `digits`, 4 | 2 | 1.50 |" in text
    assert "Measured on p, 2 threads, torch 2.14.1:\n" in text


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_no_line_of_text_in_a_region_is_long(path):
    regions = [text for _, _, text, _ in REGION.findall(path.read_text(encoding="utf-8"))]
    lines = [line for text in regions for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 128] == []


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_a_result_of_uncommitted_code_is_a_warning(arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    facts = {"device": "G", "commit": "abc+", "cuda": "13", "cudnn": 9, "packages": {"torch": "2.11"}}
    write(folder, "some-gpu-2026-01-01.json", {"parts": {"environment": {"items": {"environment": facts}}}})
    write(folder, "cpu-step-digits-2026-02-01.json", step_result("digits", 1.25, "abc+"))
    write(folder, "cpu-step-digits-2026-01-01.json", step_result("digits", 1.25, "old+"))  # not shown
    write(folder, "cpu-step-other-2026-01-01.json", step_result("other", 1.25))
    text = rewrite(document("cpu-step") + document("gpu"), folder)
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme_tables", *arguments])
    with pytest.raises(SystemExit) as ended:
        readme_tables.main()
    assert ended.value.code == 0
    warned = "readme_tables: warning: {} was measured with uncommitted changes, measure it anew\n"
    names = ("cpu-step-digits-2026-02-01.json", "some-gpu-2026-01-01.json")
    assert capsys.readouterr().err == "".join(map(warned.format, names))


def test_a_changed_number_is_written_anew(tmp_path):
    write(tmp_path, "cpu-step-digits-2026-02-01.json", step_result("digits", 1.25))
    text = rewrite(document("cpu-step"), tmp_path)
    assert rewrite(text.replace("1.25", "1.35"), tmp_path) == text


def test_distances_are_ordered_and_compared_with_the_real_ones(tmp_path):
    result = {"environment": {"processor": "p", "threads": 1, "packages": {"torch": "2.14.1"}}, "processor_seconds": 61.4}
    write(
        tmp_path, "cpu-digits-2026-01-01.json", result | {"distances": {"noise": 40.0, "real against real": 0.2, "1 step": 0.5}}
    )
    text = rewrite(document("digits"), tmp_path)
    assert "| real against real | 0.200 | 1.00 |\n| 1 step | 0.500 | 2.50 |\n| noise | 40.0 | 200 |" in text
    assert "p, 1 thread, torch 2.14.1, 61 s of processor time\n(`benchmarks/results/cpu-digits-2026-01-01.json`)." in text


def test_without_a_gpu_result_the_document_says_so_and_with_one_it_shows_steps(tmp_path):
    assert "No number here was measured on a GPU yet.\n" in rewrite(document("gpu"), tmp_path)
    step = {"step_ms": {"median": 50.0}, "batch": 128, "dtype": "bfloat16", "compiled": True, "cuda_graph": False}
    items = {
        "fastcm triton": {**step, "images_per_s": 300.0, "cuda_graph": True},
        "compiled bf16": {**step, "images_per_s": 200.0},
    }
    facts = {"environment": {"device": "Some GPU", "cuda": "13.0", "cudnn": 91000, "packages": {"torch": "2.11"}}}
    parts = {
        "environment": {"items": facts},
        "ect-128": {"items": items | {"eager fp32": {"error": "no"}}},
        "sampler": {"items": {}},
    }
    write(tmp_path, "some-gpu-2026-01-01.json", {"parts": parts})
    write(tmp_path, "some-gpu-cifar10-20min-2026-01-02.json", {})
    write(tmp_path, "smoke-cpu-2026-01-02.json", {"parts": {}})
    text = rewrite(document("gpu"), tmp_path)
    assert "Some GPU, torch 2.11, CUDA 13.0, cuDNN 91000,\nby `python -m benchmarks.gpu_report`" in text
    assert " (`benchmarks/results/some-gpu-2026-01-01.json`):\n" in text
    assert "| ECT step | dtype | compiled | CUDA graph | images/s |" in text
    assert "| fastcm triton, batch 128 | bfloat16 | yes | yes | 300 |\n" in text
    assert "| compiled bf16, batch 128 | bfloat16 | yes | no | 200 |" in text
    assert "| fastcm triton | 1.50 |" in text
    assert "No number" not in text


def test_the_real_training_is_shown_when_it_has_run(tmp_path):
    assert "`cifar10_20min` has not run yet.\n" in rewrite(document("cifar10-20min"), tmp_path)
    measured = {"tool": "fd.py", "distances": {"1 step": 3.0, "real": 0.02}}
    result = {
        "environment": {"device": "Some GPU"},
        "num": 10000,
        "stages": {"train": {"seconds": 1110.0}, "measure": measured},
    }
    write(tmp_path, "smoke-cpu-cifar10-20min-2026-01-01.json", {})
    write(tmp_path, "some-gpu-cifar10-20min-2026-01-01.json", result)
    text = rewrite(document("cifar10-20min"), tmp_path)
    assert "on Some GPU: 18.5 minutes of training\n(`benchmarks/results/some-gpu-cifar10-20min-2026-01-01.json`)" in text
    assert "distances by `fd.py`, 10,000 images a set, not FID:" in text
    assert "| real | 0.0200 |\n| 1 step | 3.00 |" in text
    assert "(docs/cifar10_20min.png)" in text


def test_a_missing_result_and_an_unknown_table_are_errors(tmp_path):
    with pytest.raises(SystemExit, match="has no result for table 'digits'"):
        rewrite(document("digits"), tmp_path)
    with pytest.raises(SystemExit, match="no table 'weather'"):
        rewrite(document("weather"), tmp_path)


def test_check_changes_nothing_and_ends_with_code_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    write(tmp_path / "benchmarks" / "results", "cpu-step-digits-2026-02-01.json", step_result("digits", 1.25))
    (tmp_path / "README.md").write_text(document("cpu-step"))
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    codes = []
    for arguments in (["--check"], [], ["--check"]):
        monkeypatch.setattr(sys, "argv", ["readme_tables", *arguments])
        with pytest.raises(SystemExit) as ended:
            readme_tables.main()
        codes.append(ended.value.code)
        assert ("1.25" in (tmp_path / "README.md").read_text()) == (len(codes) > 1)
    assert codes == [1, 0, 0]
    assert "README.md differs from its result files" in capsys.readouterr().out


def test_a_result_file_says_how_it_is_repeated_and_where_it_was_measured(tmp_path):
    measured = {"ratio": 1.5, "environment": {"threads": 7}}
    write_result(tmp_path / "r.json", "step", {"config": "digits", "batch_size": 4}, measured)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["command"] == "python -m benchmarks.step --config digits --batch-size 4"
    assert (result["config"], result["batch_size"], result["ratio"], result["environment"]["threads"]) == ("digits", 4, 1.5, 7)
    assert {"device", "processor", "packages", "commit", "time"} <= result["environment"].keys()


@pytest.mark.slow
def test_the_file_of_the_demo_is_one_that_the_table_reads(tmp_path):
    small = ["phases.pretrain.duration_images=128", "phases.tune.duration_images=128", "network.channel_mult=[1]"]
    small += ["network.attn_resolutions=[]", "network.model_channels=8"]
    result = digits_demo.measure(tmp_path / "run", small)
    assert result["processor_seconds"] > 0
    assert result["environment"]["threads"] == 1
    write_result(tmp_path / "cpu-digits-2026-01-01.json", "digits_demo", {}, result)
    assert newest_results(tmp_path, TABLES["digits"].pattern).keys() == {"cpu-digits"}
    assert re.search(r"real against real \| [\d.]+ \| 1\.00", rewrite(document("digits"), tmp_path))


def test_the_time_of_a_part_of_a_run_is_not_that_of_the_run(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(digits_demo.subprocess, "run", lambda command, check: commands.append(command))
    write(tmp_path, "evaluation.json", {"1 step": 0.5})
    write(tmp_path, "run.json", {})
    result = digits_demo.measure(tmp_path, ["seed=1"])
    assert (result["processor_seconds"], result["distances"]) == (None, {"1 step": 0.5})
    assert commands[0][1:] == ["-m", "fastcm", "train", "digits", "seed=1", "--out", str(tmp_path)]
