"""EMA snapshots of real training runs, and ``fastcm ema`` on them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import run_cli

from fastcm.cli import main
from fastcm.config import parse_config
from fastcm.errors import CheckpointError
from fastcm.io.tensors import read_tensors, write_tensors
from fastcm.train.build import open_dataset
from fastcm.train.ema_snapshots import SnapshotWriter, list_snapshots, read_snapshot, std_name
from fastcm.train.phase import Phase
from fastcm.train.run_folder import identity_digest

# The averages "check" are not meant to be stored; the tests delete their snapshots and build them from the others.
TINY = {
    "network": {"family": "ddpmpp", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
    "phases": {
        "pretrain": {
            "objective": {"kind": "edm"},
            "duration_images": 2000,
            "batch_size": 32,
            "optimizer": {"lr": 3e-3},
            "emas": {
                "main": {"kind": "power", "std": 0.05},
                "wide": {"kind": "power", "std": 0.1},
                "check": {"kind": "power", "std": 0.08},
                "half": {"kind": "halflife", "halflife_images": 500},
            },
            "ema_snapshot_images": 128,
        },
    },
    "compute": {"threads": 1},
    "telemetry": {"log_images": 500, "snapshot_images": 1000, "grid_size": 2, "heun_steps": 3},
}
END = 2016  # the first multiple of the batch size that is not below the duration
MOMENTS = [*range(128, END, 128), END]


def write_config(folder):
    (folder / "tiny.yaml").write_text(parse_config(TINY, "tiny").to_yaml())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    done = run_cli(folder, "train", "tiny.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run for one test, without the snapshots of the average that is to be built."""
    copy = shutil.copytree(trained[0], tmp_path / "run")
    for path in folder_of(copy).glob("*-std0080.safetensors"):
        path.unlink()
    return copy


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """``fastcm`` in this process, in the folder of the test: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            main([*map(str, arguments)])
            code = 0
        except SystemExit as ended:
            code = ended.code
        return (code, *capsys.readouterr())

    return call


def folder_of(run):
    return run / "ema_snapshots" / "pretrain"


def weights(path, ema):
    """All parameters of one average of a file, as one fp64 vector."""
    tensors, _ = read_tensors(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors) if name.startswith(f"{ema}/")])


def distance(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_average_of_a_new_width_equals_the_one_that_was_followed(command, run):
    assert command("ema", run, "--std", 0.08)[0] == 0
    finished = run / "pretrain.safetensors"
    wanted = weights(finished, "ema/check")
    stored = [distance(weights(finished, f"ema/{name}"), wanted) for name in ("main", "wide")]
    # Measured: 2.1e-4, which is the rounding of fp16, against 1.3e-2 and 8.3e-3 of the stored averages.
    assert distance(weights(run / "pretrain-ema.safetensors", "ema/std0080"), wanted) < min(5e-4, min(stored) / 10)


def test_it_says_what_it_used_and_how_well_it_fits(command, run):
    _, printed, _ = command("ema", run, "--std", 0.08, "--std", 0.12, "--std", 0.08)
    assert f"pretrain at {END} images, from" in printed
    assert re.search(rf"  \d+ of std 0.05, \d+ to {END} images\n  16 of std 0.1, 128 to {END} images", printed)
    mismatches = re.findall(r"^(std\d+): kernel mismatch ([\d.e-]+) %$", printed, re.MULTILINE)
    assert [name for name, _ in mismatches] == ["std0080", "std0120"]
    assert all(0 < float(value) < 2 for _, value in mismatches)
    assert f"model: {run / 'pretrain-ema.safetensors'}" in printed


def test_bundle_is_sampled_and_described_as_any_other(command, run, tmp_path):
    assert command("ema", run, "--std", 0.08, "--std", 0.2, "--images", 1500, "--out", "new.safetensors")[0] == 0
    facts = json.loads(command("info", "new.safetensors")[1])
    assert facts["emas"] == ["std0080", "std0200"]
    assert facts["trained"]["images"] == 1500
    assert facts["trained"]["posthoc_ema"]["mismatch"].keys() == {"std0080", "std0200"}
    for ema in ("", "std0200", "net"):
        code, _, errors = command("sample", "new.safetensors", "--num", 4, "--steps", 3, "--ema", ema, "--out", f"p{ema}.png")
        assert code == 0, errors
    pictures = [(tmp_path / f"p{ema}.png").read_bytes() for ema in ("", "std0200", "net")]
    assert pictures[0] == pictures[2] != pictures[1]  # the raw weights are those of the first average


def test_average_at_a_snapshot_is_that_snapshot_whatever_came_later(command, run):
    options = ("--std", 0.1, "--std", 0.07, "--images", 1024, "--out")
    assert command("ema", run, *options, run / "a.safetensors")[0] == 0
    for snapshot in list_snapshots(folder_of(run)):
        if snapshot.images > 1024:
            snapshot.path.unlink()
    assert command("ema", run, *options, run / "b.safetensors")[0] == 0
    for ema in ("ema/std0100", "ema/std0070"):
        assert torch.equal(weights(run / "a.safetensors", ema), weights(run / "b.safetensors", ema))
    stored = weights(folder_of(run) / "000000001024-std0100.safetensors", "ema")
    torch.testing.assert_close(weights(run / "a.safetensors", "ema/std0100"), stored, rtol=1e-6, atol=1e-7)


def test_poor_fit_is_announced(command, run, caplog):
    for snapshot in list_snapshots(folder_of(run)):
        if snapshot.images not in (1024, END):
            snapshot.path.unlink()
    assert command("ema", run, "--std", 0.06)[0] == 0
    assert caplog.messages == []
    assert command("ema", run, "--std", 0.02)[0] == 0
    assert caplog.messages[0].startswith(f"std0020 at {END} images: its averaging kernel misses the one asked for by")


def test_snapshots_are_halves_and_their_size_is_foretold(trained):
    run, said = trained
    stored = list_snapshots(folder_of(run))
    assert [(s.images, s.std) for s in stored] == [(images, std) for images in MOMENTS for std in (0.05, 0.08, 0.1)]
    sizes = 0
    for snapshot in stored:
        tensors, header = read_tensors(snapshot.path)
        assert {value.dtype for name, value in tensors.items() if name.startswith("ema/")} == {torch.float16}
        assert header["bundle"]["trained"]["config_hash"] == json.loads((run / "run.json").read_text())["config_hash"]
        sizes += sum(value.nbytes for value in tensors.values())
    foretold = re.search(r"pretrain: 16 x 3 EMA snapshots will take ([\d.]+) MB in run/ema_snapshots/pretrain", said)
    assert float(foretold[1]) == pytest.approx(sizes / 1e6, abs=0.06)
    assert said.count("will take") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--std", "0"], 2, "std 0: the relative width of an average lies between 0 and 0.28"),
        (["--std", "0.28"], 2, "std 0.28"),
        (["--std", "nan"], 2, "std nan"),
        (["--std", "-0.1"], 2, "std -0.1"),
        (["--std", "0.08", "--images", str(END + 1)], 2, f"{END + 1} images: the EMA snapshots in run/ema_snapshots/pretrain"),
        (["--std", "0.08", "--images", "0"], 2, "--images"),
        (["--std", "0.08", "--phase", "tune"], 2, "phase 'tune' has no EMA snapshots in run; there are some of pretrain"),
        ([], 2, "--std"),
        (["--std", "0.08", "--out", "run"], 3, "cannot write run"),
    ],
)
def test_wrong_arguments_are_named(command, run, arguments, code, words):
    ended, output, errors = command("ema", "run", *arguments)
    assert (ended, output) == (code, "")
    assert words in errors
    assert len(errors.strip().splitlines()) == 1


def test_run_without_snapshots_and_folder_without_a_run(command, run):
    shutil.rmtree(run / "ema_snapshots")
    code, _, errors = command("ema", "run", "--std", 0.08)
    assert code == 3
    assert "no EMA snapshots of this run; train with phases.<phase>.ema_snapshot_images above 0" in errors
    (run / "run.json").write_text("{")
    for folder in ("run", "nowhere"):
        code, _, errors = command("ema", folder, "--std", 0.08)
        assert code == 3
        assert f"{folder}/run.json: cannot be read" in errors


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def replaced_by_a_neighbour(path):
    shutil.copy(path.with_name("000000001024-std0100.safetensors"), path)


def of_another_run(path):
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, {**header, "identity": "0123456789abcdef"})


def of_a_later_format(path):
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, {**header, "format": 2})


def without_a_header_field(path):
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, {name: value for name, value in header.items() if name != "bundle"})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut_short, "damaged or cut short"),
        (emptied, "damaged or cut short"),
        (one_bit_flipped, "does not match its SHA-256"),
        (replaced_by_a_neighbour, "not what its place and name say"),
        (of_another_run, "snapshot of another run (identity 0123456789abcdef"),
        (of_a_later_format, "snapshot format 2"),
        (without_a_header_field, "damaged header"),
    ],
)
def test_unusable_snapshot_is_named_and_can_be_left_out(command, run, caplog, harm, words):
    bad = folder_of(run) / "000000001920-std0050.safetensors"
    harm(bad)
    code, _, errors = command("ema", "run", "--std", 0.08)
    assert code == 3
    assert f"ema_snapshots/pretrain/{bad.name}: " in errors
    assert words in errors
    assert not (run / "pretrain-ema.safetensors").exists()
    assert command("ema", "run", "--std", 0.08, "--skip-damaged")[0] == 0
    assert [message for message in caplog.messages if f"snapshot left out: run/ema_snapshots/pretrain/{bad.name}: " in message]
    wanted = weights(run / "pretrain.safetensors", "ema/check")
    assert distance(weights(run / "pretrain-ema.safetensors", "ema/std0080"), wanted) < 1e-3


def test_nothing_usable_at_all(command, run):
    for snapshot in list_snapshots(folder_of(run)):
        emptied(snapshot.path)
    code, _, errors = command("ema", "run", "--std", 0.08, "--skip-damaged")
    assert code == 3
    assert "none of the EMA snapshots can be used" in errors


DIE_AT_RENAME = """
import os, signal, sys
real = os.replace
def replace(source, target):
    if os.path.basename(target) == "{name}":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, target)
os.replace = replace
from fastcm.cli import main
main()
"""


@pytest.mark.parametrize("moment", [1024, 1280])  # with a checkpoint, and between two of them
def test_killed_run_ends_with_the_same_snapshots(trained, command, tmp_path, moment):
    write_config(tmp_path)
    code = DIE_AT_RENAME.format(name=f"{moment:012d}-std0080.safetensors")
    arguments = [sys.executable, "-c", code, "train", "tiny.yaml", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = folder_of(tmp_path / "run")
    # Such a file is left where a run went another way after the checkpoint.
    shutil.copy(folder / f"{moment:012d}-std0050.safetensors", folder / f"{moment + 32:012d}-std0050.safetensors")
    assert command("train", "tiny.yaml", "--out", "run")[0] == 0
    files, expected = ({path.name: path.read_bytes() for path in where.iterdir()} for where in (folder, folder_of(trained[0])))
    assert files == expected


def test_run_that_begins_anew_keeps_no_old_snapshots(trained, command, tmp_path):
    write_config(tmp_path)
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    changed = ("seed=5", "phases.pretrain.duration_images=256", "phases.pretrain.ema_snapshot_images=200")
    assert command("train", "tiny.yaml", *changed, "--out", "run")[0] == 0
    assert {snapshot.images for snapshot in list_snapshots(folder_of(tmp_path / "run"))} == {224, 256}
    assert command("ema", "run", "--std", 0.05)[0] == 0


def test_no_power_average_to_keep_is_a_configuration_error(command):
    code, _, errors = command("train", "digits", "phases.tune.ema_snapshot_images=64", "--dry-run")
    assert code == 2
    assert "phases.tune: ema_snapshot_images is 64, but no EMA in emas is of kind 'power'" in errors


@pytest.fixture
def phase():
    """A phase after its first step."""
    averages = {name: {"kind": "power", "std": 0.05} for name in ("main", "twin")}
    settings = {**TINY["phases"]["pretrain"], "emas": averages, "ema_snapshot_images": 32}
    config = parse_config({**TINY, "phases": {"pretrain": settings}}, "tiny")
    device = torch.device("cpu")
    phase = Phase(config, "pretrain", open_dataset(config.data, device), device, 0)
    phase.start(None)
    phase.step()
    return phase


def test_value_beyond_fp16_is_kept_in_fp32(phase, tmp_path):
    for ema in phase.averages.values():
        name, average = next(iter(ema.averages.items()))
        average.fill_(70_000.5)
    SnapshotWriter(tmp_path / "pretrain", phase, {"seed": 0}).advance(0)
    (snapshot,) = list_snapshots(tmp_path / "pretrain")  # two averages of one width are one
    tensors, _ = read_snapshot(snapshot, identity_digest({"seed": 0}))
    assert torch.equal(tensors.pop(f"ema/{name}"), average)
    assert {value.dtype for key, value in tensors.items() if key.startswith("ema/")} == {torch.float16}
    with pytest.raises(CheckpointError, match="another run"):
        read_snapshot(snapshot, identity_digest({"seed": 1}))


def test_no_interval_means_no_snapshots(phase, tmp_path):
    phase.settings = phase.settings.model_copy(update={"ema_snapshot_images": 0})
    SnapshotWriter(tmp_path / "pretrain", phase, {}).advance(0)
    assert not (tmp_path / "pretrain").exists()


@pytest.mark.parametrize(
    ("std", "name"),
    [(0.05, "std0050"), (0.1, "std0100"), (0.0125, "std00125"), (1e-5, "std000001"), (0.07500001, "std007500001")],
)
def test_width_names_its_file_and_is_read_back_from_it(tmp_path, std, name):
    assert std_name(std) == name
    (tmp_path / f"000000000064-{name}.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    assert [(snapshot.images, snapshot.std) for snapshot in list_snapshots(tmp_path)] == [(64, std)]
