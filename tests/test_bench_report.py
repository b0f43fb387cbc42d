"""Tables, files and comparisons of benchmark results."""

import json
import math
import subprocess

import pytest
import torch

from fastcm.bench import costs
from fastcm.bench.cases import DTYPES, OP_PASSES, PASSES, cases
from fastcm.bench.hardware import DATA_SHEETS, environment, source_commit
from fastcm.bench.report import as_json, floor_table, kernel_table, load, save, slower, text_table
from fastcm.errors import ConfigError


def row(median_us=10.0, backend="triton", status="ok", **other):
    timing = {"median_us": median_us, "p20_us": median_us - 1, "p80_us": median_us + 1, "n": 9}
    head = {"op": "group_norm", "pass": "fwd", "shapes": "digits8", "shape": "32x8x8 g8", "batch": 2, "dtype": "bf16"}
    times = {"kernel": None, "call": timing, "bytes_per_s": 5e9, "copy_share": 0.5, "relative_error": 2e-3}
    why = {"reason": None} if status == "ok" else {"reason": "relative error 1 is above 1e-02"}
    return {**head, "backend": backend, "status": status, **why, **(times if status == "ok" else {}), **other}


def result(*rows, device="some GPU"):
    facts = {"device": device, "packages": {"torch": "2.x"}}
    return {"environment": facts, "copy_bytes_per_s": 1e10, "rows": list(rows)}


def test_columns_are_aligned_numbers_to_the_right():
    assert text_table(("name", "us"), [("a", "1.5"), ("long", "10.5")]) == "name    us\na      1.5\nlong  10.5"


def test_the_table_shows_speeds_and_why_there_is_none():
    text = kernel_table(result(row(), row(backend="mine", status="failed"), row(backend="apex", status="unavailable")))
    lines = text.splitlines()
    assert "copy 10.0 GB/s" in lines[0]
    assert any("triton" in line and "9.0-11.0" in line and "0.50" in line for line in lines)
    assert any(line.startswith("group_norm") and "mine" in line and line.endswith("failed") for line in lines)
    assert "mine failed (1 rows): relative error 1 is above 1e-02" in lines
    assert not any(line.startswith("group_norm") and "apex" in line for line in lines)
    assert "no CUDA device" in kernel_table(result(row(), device="cpu"))


def test_slower_rows_are_listed_and_faster_ones_not():
    old = result(row(10.0), row(20.0, backend="torch"))
    assert slower(result(row(10.4), row(19.0, backend="torch")), old, 5.0) == []
    ((*_, was, now, change),) = slower(result(row(10.6), row(20.0, backend="torch")), old, 5.0)
    assert (was, now, change) == ("10.0", "10.6", "+6.0 %")
    assert len(slower(result(row(10.6), row(20.9, backend="torch")), old, 4.0)) == 2


def test_a_row_that_lost_its_speed_counts_as_slower():
    (line,) = slower(result(row(status="failed")), result(row()), 5.0)
    assert line[-1] == "failed"


def test_device_times_are_compared_where_there_are_some():
    def with_kernel(us):
        return row(kernel={"median_us": us, "p20_us": us, "p80_us": us, "n": 5})

    assert slower(result(with_kernel(5.0)), result(with_kernel(4.0)), 5.0)[0][-1] == "+25.0 %"


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ConfigError, match="another GPU"):
        slower(result(row(), device="another GPU"), result(row()), 5.0)
    for other in ({"backend": "torch"}, {"batch": 4}, {"dtype": "fp32"}, {"shape": "x"}, {"shapes": "x"}, {"pass": "bwd"}):
        with pytest.raises(ConfigError, match="no row"):
            slower(result({**row(), **other}), result(row()), 5.0)


def test_results_survive_the_file(tmp_path):
    save(tmp_path / "a.json", result(row()))
    assert load(tmp_path / "a.json") == result(row())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": []}', '{"environment": {}, "rows": []}'])
def test_a_file_of_another_kind_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ConfigError, match=r"old\.json"):
        load(tmp_path / "old.json")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        load(tmp_path / "missing.json")


def test_json_is_strict():
    text = as_json({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": None, "e": "NaN"}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "b": {"c": None, "d": None, "e": "NaN"}}


def case_of(op, direction="fwd", dtype="bf16", batch=128):
    return next(cases(op, "ddpmpp32", batch, DTYPES[dtype], (direction,)))


def test_floors_follow_from_bytes_and_the_data_sheet():
    case = case_of("add_noise")
    cost = costs.case_cost(case)
    # fp32 images read; x in fp32 and the network's input in bf16 written for each of two levels.
    assert (cost.read_bytes, cost.write_bytes) == (128 * 3072 * 4, 128 * 3072 * 2 * (4 + 2))
    last = floor_table([case]).splitlines()[1].split()
    assert [float(cell) for cell in last[-3:]] == [
        pytest.approx(cost.bytes / sheet.bytes * 1e6, abs=0.06) for sheet in DATA_SHEETS.values()
    ]


def test_norm_and_attention_move_each_image_once():
    image, rows = 128 * 256 * 32**2, 1
    norm = [costs.case_cost(case_of("group_norm", direction)) for direction in ("fwd", "bwd", "jvp")]
    for cost, passes in zip(norm, (2, 3, 4), strict=True):
        assert cost.bytes == pytest.approx(passes * image * 2, rel=0.01)
    assert norm[0].read_bytes == image * 2 + 2 * 4 * 256 + rows * 128 * 256 * 2
    part = 128 * 256 * 256 * 2
    attention = [costs.case_cost(case_of("attention", direction)) for direction in ("fwd", "bwd", "jvp")]
    for cost, parts, products in zip(attention, (4, 8, 8), (2, 5, 6), strict=True):
        assert cost.bytes == pytest.approx(parts * part, rel=0.01)
        assert cost.flops == products * 2 * 128 * 256 * 256 * 256


def test_the_loss_reads_no_teacher_under_the_boundary():
    forward, backward, jvp = (costs.case_cost(case_of("consistency_loss", direction)) for direction in ("fwd", "bwd", "jvp"))
    student, clean_rows = 128 * (2 + 4), 128 // 8
    reads = 3072 * (student + (128 - clean_rows) * (2 + 4) + clean_rows * 4)
    assert forward.read_bytes == backward.read_bytes == reads
    assert backward.write_bytes == 128 * 3072 * 2
    assert jvp.read_bytes == reads + 3072 * student
    assert jvp.write_bytes == forward.write_bytes == 2 * 4 * 128


def test_the_optimizer_moves_the_known_bytes_per_parameter():
    parameters = case_of("optimizer").shape.num_parameters
    assert costs.case_cost(case_of("optimizer")).bytes == 42 * parameters
    assert costs.case_cost(case_of("optimizer", dtype="fp32")).bytes == 40 * parameters


def test_every_case_has_a_cost():
    chosen = [case for op in OP_PASSES for case in cases(op, "digits8", 2, DTYPES["bf16"], tuple(PASSES))]
    for case in chosen:
        cost = costs.case_cost(case)
        assert cost.read_bytes > 0
        assert cost.write_bytes > 0
        assert cost.flops > 0
    assert len(floor_table(chosen).splitlines()) == len(chosen) + 3


def test_a_commit_is_marked_where_the_code_differs_from_it_and_not_for_results_and_documents(tmp_path):
    def git(*words):
        options = ["-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *options, *words], capture_output=True, text=True, check=True).stdout.strip()

    assert source_commit(tmp_path) is None
    for name in ("fastcm/a.py", "kernels/b.py", "benchmarks/results/c.json", "benchmarks/NOTES.md", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    for name in ("benchmarks/results/c.json", "benchmarks/results/new.json", "benchmarks/NOTES.md", "README.md"):
        (tmp_path / name).write_text("2")
    assert source_commit(tmp_path) == commit
    (tmp_path / "kernels" / "b.py").write_text("2")
    assert source_commit(tmp_path) == commit + "+"


def test_the_environment_names_the_versions():
    facts = environment(torch.device("cpu"))
    assert facts["device"] == "cpu"
    assert facts["packages"]["torch"] == torch.__version__
    assert json.loads(as_json(facts)) == facts
