"""``fastcm bench`` as a user runs it."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

from fastcm.bench.cases import DTYPES, OP_PASSES, PASSES
from fastcm.bench.shapes import ALL_SETS
from fastcm.cli import cli, main
from fastcm.cli.bench import bench_kernels, bench_tune

TOY = ["--shapes", "digits8", "--batch", "2", "--dtype", "fp32", "--budget", "0", "--device", "cpu"]


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)], catch_exceptions=False)


def ended(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["bench", *map(str, arguments)])
    return end.value.code, capsys.readouterr()


def test_choices_are_those_of_the_code():
    for command in (bench_kernels, bench_tune):
        choices = {p.name: list(p.type.choices) for p in command.params if isinstance(p.type, click.Choice)}
        assert choices["op"] == list(OP_PASSES)
        assert choices["shapes"] == list(ALL_SETS)
        assert set(choices["dtype"]) == set(DTYPES)
        assert choices["directions"] == list(PASSES)


def test_dry_run_prints_floors_and_measures_nothing(monkeypatch):
    monkeypatch.setattr("fastcm.bench.measure.measure", pytest.fail)
    done = bench("kernels", "--dry-run", "--shapes", "adm64", "--batch", "16")
    assert done.exit_code == 0
    assert "A100 us" in done.output
    assert "1536x8x8 g32 silu" in done.output
    assert "T1024 h6 d64" in done.output


def test_kernels_are_measured_written_and_compared(tmp_path, capsys):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    done = bench("kernels", "attention", *TOY, "--pass", "fwd", "--backend", "torch", "--json", new)
    assert done.exit_code == 0
    assert "no CUDA device" in done.output
    result = json.loads(new.read_text())
    (row,) = result["rows"]
    assert (row["op"], row["pass"], row["backend"], row["status"]) == ("attention", "fwd", "torch", "ok")
    assert result["environment"]["packages"]["torch"] == torch.__version__

    for factor, code in ((1e6, 0), (1e-6, 1)):
        values = {name: value * factor for name, value in row["call"].items()}
        old.write_text(json.dumps({**result, "rows": [{**row, "call": values}]}))
        arguments = ["kernels", "attention", *TOY, "--pass", "fwd", "--backend", "torch", "--compare", old]
        if code:
            found, output = ended(capsys, *arguments)
            assert found == 1
            assert "slower by more than 5 %" in output.out
            assert "1 rows are slower" in output.err
        else:
            assert bench(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "choose 'kernels' or 'tune'"),
        (["kernels", "softmax"], "softmax"),
        (["kernels", "optimizer", *TOY, "--pass", "jvp"], "optimizer has only fwd"),
        (["kernels", *TOY, "--backend", "cudnn"], "no backend cudnn"),
        (["kernels", *TOY, "--compare", "nowhere.json"], "nowhere.json"),
        (["kernels", "--shapes", "sdxl"], "sdxl"),
        (["kernels", "--batch", "0"], "--batch"),
    ],
)
def test_misuse_ends_with_code_2_and_says_why(capsys, arguments, words):
    code, output = ended(capsys, *arguments)
    assert code == 2
    assert words in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("arguments", [["tune"], ["--tune"]])
def test_tuning_without_a_gpu_ends_with_code_2(capsys, arguments):
    code, output = ended(capsys, *arguments)
    assert code == 2
    assert "needs a CUDA device" in output.err


def test_a_triton_kernel_is_checked_and_measured(fastcm_cli, tmp_path):
    """In Triton's interpreter, where there is no GPU."""
    arguments = ["add_noise", "--shapes", "digits8", "--batch", "2", "--dtype", "fp32", "--budget", "0", "--device", "cpu"]
    done = fastcm_cli("bench", "kernels", *arguments, "--backend", "triton", "--json", "r.json", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert (row["backend"], row["status"]) == ("triton", "ok")
