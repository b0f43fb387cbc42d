"""Training runs as a user starts them: through the command line, on the real embedded digits, with tiny networks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import run_cli
from PIL import Image

from fastcm.config import load_config, parse_config
from fastcm.io.tensors import read_tensors
from fastcm.train.checkpoint import list_checkpoints, load_newest
from fastcm.train.run_folder import identity_changes, identity_digest, run_identity

TINY = {
    "data": {"kind": "digits"},
    "network": {"family": "ddpmpp", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]},
    "phases": {
        "pretrain": {
            "objective": {"kind": "edm"},
            "duration_images": 192,
            "batch_size": 16,
            "dropout": 0.1,
            "optimizer": {"kind": "adam", "lr": 1e-3, "warmup_images": 32},
            "emas": {"main": {"halflife_images": 64, "rampup_ratio": 0.5}, "wide": {"kind": "power", "std": 0.1}},
        },
        "tune": {
            "objective": {"kind": "ect", "double_images": 64, "max_stage": 2},
            "duration_images": 128,
            "batch_size": 16,
            "dropout": 0.1,
            "optimizer": {"kind": "radam", "lr": 1e-3, "cooldown_images": 64},
        },
    },
    "telemetry": {"log_images": 32, "snapshot_images": 64, "grid_size": 2, "heun_steps": 3},
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(parse_config(TINY, "tiny").to_yaml())
    return path


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(parse_config(TINY, "tiny").to_yaml())
    run = run_cli(folder, "train", "tiny.yaml", "--out", "run")
    assert run.returncode == 0, run.stderr
    return folder / "run"


@pytest.fixture
def finished(finished_once, tiny):
    """A finished run of its own for every test, at ``run`` beside tiny.yaml."""
    return shutil.copytree(finished_once, tiny.parent / "run")


def picture_size(path):
    with Image.open(path) as image:
        return image.size


def weights(run):
    return {name: read_tensors(run / f"{name}.safetensors")[0] for name in ("pretrain", "tune", "model")}


def without_time(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def assert_same_run(first, second):
    one, two = weights(first), weights(second)
    for bundle in one:
        assert one[bundle].keys() == two[bundle].keys()
        assert all(torch.equal(one[bundle][key], two[bundle][key]) for key in one[bundle])
    assert without_time(first) == without_time(second)
    pictures = sorted(path.name for path in (first / "samples").iterdir())
    assert pictures == sorted(path.name for path in (second / "samples").iterdir())
    for name in pictures:
        assert (first / "samples" / name).read_bytes() == (second / "samples" / name).read_bytes()


def test_one_command_trains_both_phases_and_leaves_everything_to_look_at(finished):
    config = load_config(str(finished / "config.yaml"))
    assert config.phases.keys() == {"pretrain", "tune"}
    facts = json.loads((finished / "run.json").read_text())
    assert facts["config_hash"] == config.hash
    assert len(facts["identity"]["data"]["fingerprint"]) == 64
    metrics = without_time(finished)
    assert [line["images"] for line in metrics] == [32, 64, 96, 128, 160, 192, 224, 256, 288, 320]
    assert all(line["loss"] > 0 and line["skipped_steps"] == 0 and line["loss_by_sigma"] for line in metrics)
    assert [line["decay"] for line in metrics if line["phase"] == "tune"] == [0.5, 0.25, 0.25, 0.125]
    pictures = {path.name for path in (finished / "samples").iterdir()}
    assert {f"pretrain-{kind}-000000000064.png" for kind in ("1step", "2step", "heun")} <= pictures
    assert {f"tune-{kind}-000000000128.png" for kind in ("1step", "2step")} <= pictures
    assert picture_size(finished / "samples" / "tune-1step-000000000128.png") == (66, 66)
    assert picture_size(finished / "loss.png")[0] > 500
    report = (finished / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 6
    assert facts["config_hash"] in report


def test_same_command_on_a_finished_run_changes_nothing(fastcm_cli, tiny, finished):
    before = {path.name: path.read_bytes() for path in finished.glob("*.safetensors")}
    again = fastcm_cli("train", tiny, "--out", "run")
    assert again.returncode == 0
    assert before == {path.name: path.read_bytes() for path in finished.glob("*.safetensors")}


def test_two_runs_are_equal_bit_for_bit(fastcm_cli, tiny, finished):
    assert fastcm_cli("train", tiny, "--out", "other").returncode == 0
    assert_same_run(finished, tiny.parent / "other")


def _interrupt(tiny, number, after_images):
    """Start a run, send it a signal once its metrics passed ``after_images``, and return its exit code."""
    run = tiny.parent / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastcm", "train", str(tiny), "--out", str(run)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and any(
            json.loads(line)["images"] >= after_images for line in metrics.read_text().splitlines()[:-1]
        ):
            process.send_signal(number)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize(("number", "after_images"), [(signal.SIGKILL, 32), (signal.SIGKILL, 160), (signal.SIGKILL, 224)])
def test_resume_after_sigkill_is_bit_exact(fastcm_cli, tiny, finished, number, after_images):
    code, _ = _interrupt(tiny, number, after_images)
    assert code == -number
    resumed = fastcm_cli("train", tiny, "--out", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(finished, tiny.parent / "killed")


DIE_AT_RENAME = """
import os, signal
calls, real = 0, os.replace
def replace(*paths):
    global calls
    calls += 1
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*paths)
os.replace = replace
from fastcm.cli import main
main()
"""


@pytest.mark.parametrize("number", [1, 5, 11, 12, 20])
def test_kill_while_any_file_is_being_saved_is_harmless(fastcm_cli, tiny, finished, number):
    killed = tiny.parent / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DIE_AT_RENAME.format(number=number), "train", str(tiny), "--out", str(killed)]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == -signal.SIGKILL
    resumed = fastcm_cli("train", tiny, "--out", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(finished, killed)
    assert not [path for path in killed.rglob("*") if ".tmp-" in path.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_at_the_next_step_and_exits_75_and_resumes_bit_exact(fastcm_cli, tiny, finished, number):
    code, errors = _interrupt(tiny, number, 64)
    assert code == 75, errors
    assert f"stopped by {number.name}" in errors
    assert errors.count("fastcm: error") == 1
    assert "Traceback" not in errors
    resumed = fastcm_cli("train", tiny, "--out", "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    assert_same_run(finished, tiny.parent / "killed")


def test_damaged_newest_checkpoint_costs_one_interval_and_nothing_else(fastcm_cli, tiny, finished):
    assert fastcm_cli("train", tiny, "--out", "other").returncode == 0
    other = tiny.parent / "other"
    newest = list_checkpoints(other / "checkpoints")[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = fastcm_cli("train", tiny, "--out", "other")
    assert again.returncode == 0
    assert "checkpoint skipped" in again.stderr
    assert_same_run(finished, other)


def test_every_checkpoint_damaged_is_exit_3(fastcm_cli, tiny, finished):
    for checkpoint in list_checkpoints(finished / "checkpoints"):
        (checkpoint / "manifest.json").write_text("")
    failed = fastcm_cli("train", tiny, "--out", "run")
    assert failed.returncode == 3
    assert "every checkpoint is damaged" in failed.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("network.model_channels=16", "network.model_channels was 8, is 16"),
        ("phases.tune.batch_size=32", "phases.tune.batch_size was 16, is 32"),
        ("data.xflip=true", "data.xflip was False, is True"),
        ("seed=1", "seed was 0, is 1"),
        ("compute.dtype=bfloat16", "compute.dtype was 'float32', is 'bfloat16'"),
        ("phases.pretrain.objective.p_mean=-1.0", "phases.pretrain.objective.p_mean was -1.2, is -1.0"),
    ],
)
def test_resume_with_another_identity_is_refused(fastcm_cli, tiny, finished, override, named):
    failed = fastcm_cli("train", tiny, override, "--out", "run")
    assert failed.returncode == 2
    assert named in failed.stderr


def identity_of(**changes):
    return run_identity(parse_config({**TINY, **changes}, "tiny"), {"fingerprint": "0"})


def distilled(**objective):
    return {"distill": {"objective": objective, "duration_images": 16}}


LPIPS, FEATURES = distilled(kind="ict", distance="lpips"), distilled(kind="ict", distance="features")
GAN = distilled(kind="ctm", distance="l2", gan={})


@pytest.mark.parametrize(
    ("phases", "section"),
    [
        (TINY["phases"], {"lpips": "a", "discriminator": {"net": "a"}, "distance": {"net": "a"}, "dtype": "float16"}),
        (LPIPS, {"discriminator": {"net": "a"}, "distance": {"net": "a"}, "size": 64}),
        (FEATURES, {"lpips": "a", "lpips_linear": "a", "lpips_resize": 64, "discriminator": {"net": "a"}}),
        (GAN, {"lpips": "a", "lpips_linear": "a", "distance": {"net": "a"}, "distance_augment": False}),
    ],
)
def test_feature_networks_that_no_phase_uses_are_no_part_of_the_identity(phases, section):
    assert identity_changes(identity_of(phases=phases), identity_of(phases=phases, features=section)) == []


@pytest.mark.parametrize(
    ("phases", "section"),
    [
        (LPIPS, lambda file: {"lpips": file, "lpips_linear": "weights"}),
        (LPIPS, lambda file: {"lpips": "weights", "lpips_linear": file}),
        (FEATURES, lambda file: {"distance": {"net": file}}),
        (GAN, lambda file: {"discriminator": {"net": file}}),
    ],
)
def test_weights_of_feature_networks_may_move_but_not_change(phases, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"1")
    (tmp_path / "moved").write_bytes(b"1")
    (tmp_path / "other").write_bytes(b"2")
    saved, moved, other = (identity_of(phases=phases, features=section(name)) for name in ("weights", "moved", "other"))
    assert identity_changes(saved, moved) == []
    assert identity_digest(saved) == identity_digest(moved)
    assert [line.startswith("features.") for line in identity_changes(saved, other)] == [True]
    assert identity_changes(saved, identity_of(phases=phases, features=section("random")))


def test_resume_goes_on_where_unused_weights_are_configured(fastcm_cli, tiny, finished):
    again = fastcm_cli("train", tiny, "features.lpips=vgg16.pth", "--out", "run")
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr


def test_bundle_that_a_phase_began_from_may_move_or_go_but_not_change(fastcm_cli, tiny, finished, tmp_path):
    bundles = [tmp_path / f"{name}.safetensors" for name in ("first", "moved", "other")]
    for bundle, phase in zip(bundles, ("pretrain", "pretrain", "tune"), strict=True):
        shutil.copy(finished / f"{phase}.safetensors", bundle)
    single = {"pretrain": {**TINY["phases"]["pretrain"], "ema_snapshot_images": 64}}
    tiny.write_text(parse_config({**TINY, "phases": single}, "tiny").to_yaml())

    def train(bundle, images):
        options = [f"phases.pretrain.init={bundle}", f"phases.pretrain.duration_images={images}"]
        return fastcm_cli("train", tiny, *options, "--out", "second")

    assert train(bundles[0], 64).returncode == 0
    refused = train(bundles[2], 128)
    assert refused.returncode == 2
    assert "phases.pretrain.init was 'sha256 " in refused.stderr
    moved = train(bundles[1], 128)
    assert moved.returncode == 0, moved.stderr
    bundles[1].unlink()
    gone = train(bundles[1], 192)
    assert gone.returncode == 0, gone.stderr
    averaged = fastcm_cli("ema", "second", "--std", "0.12")
    assert averaged.returncode == 0, averaged.stderr
    assert "3 of std 0.1, 64 to 192 images" in averaged.stdout


def test_identity_is_checked_without_run_json_too(fastcm_cli, tiny, finished):
    (finished / "run.json").unlink()
    failed = fastcm_cli("train", tiny, "seed=5", "--out", "run")
    assert failed.returncode == 2
    assert "seed was 0, is 5" in failed.stderr


def test_failed_start_leaves_the_folder_free_for_the_mended_command(fastcm_cli, tiny):
    assert fastcm_cli("train", tiny, "phases.tune.init=nowhere.safetensors", "--out", "run").returncode == 3
    mended = fastcm_cli("train", tiny, "phases.pretrain.duration_images=16", "phases.tune.duration_images=16", "--out", "run")
    assert mended.returncode == 0, mended.stderr


def test_phase_that_cannot_use_the_one_before_is_refused_at_the_start(fastcm_cli, tiny):
    failed = fastcm_cli("train", tiny, "phases.pretrain.objective.variant=vp", "--out", "run")
    assert failed.returncode == 2
    assert "phases.tune: its network sees noise levels as" in failed.stderr
    assert not (tiny.parent / "run" / "metrics.jsonl").exists()


def test_diverging_run_ends_with_one_clear_line(fastcm_cli, tiny):
    failed = fastcm_cli(
        "train", tiny, "phases.pretrain.optimizer.lr=1e30", "phases.pretrain.optimizer.warmup_images=0", "--out", "run"
    )
    assert failed.returncode == 1
    assert "training diverged: no finite step" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("name", "content"), [("run.json", b"[]"), ("metrics.jsonl", b"{}\n\xff\n"), ("evaluation.json", b"{")]
)
def test_damaged_side_file_is_no_obstacle(fastcm_cli, tiny, finished, name, content):
    (finished / name).write_bytes(content)
    assert fastcm_cli("train", tiny, "--out", "run").returncode == 0


def test_duration_may_be_extended_on_resume(fastcm_cli, tiny, finished):
    longer = fastcm_cli("train", tiny, "phases.tune.duration_images=160", "--out", "run")
    assert longer.returncode == 0, longer.stderr
    assert load_newest(finished / "checkpoints")[1]["images"] == 160


def test_microbatches_change_rounding_only(fastcm_cli, tiny, finished):
    split = fastcm_cli("train", tiny, "phases.pretrain.microbatch_size=4", "phases.tune.microbatch_size=8", "--out", "split")
    assert split.returncode == 0, split.stderr
    for whole, parts in zip(without_time(finished), without_time(tiny.parent / "split"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=2e-3)


def test_bfloat16_trains_on_the_cpu(fastcm_cli, tiny, finished):
    run = fastcm_cli("train", tiny, "compute.dtype=bfloat16", "--out", "half")
    assert run.returncode == 0, run.stderr
    half = [line["loss"] for line in without_time(tiny.parent / "half")]
    assert half == pytest.approx([line["loss"] for line in without_time(finished)], rel=0.05)
    assert all(t.dtype == torch.float32 for k, t in weights(tiny.parent / "half")["model"].items() if "freqs" not in k)


def test_phase_starts_from_a_given_bundle(fastcm_cli, tiny, finished):
    only_tune = TINY | {"phases": {"tune": {**TINY["phases"]["tune"], "init": str(finished / "pretrain.safetensors")}}}
    path = tiny.parent / "tune.yaml"
    path.write_text(parse_config(only_tune, "tune").to_yaml())
    assert fastcm_cli("train", path, "phases.tune.optimizer.lr=1e-12", "--out", "tuned").returncode == 0
    start = read_tensors(finished / "pretrain.safetensors")[0]
    end = read_tensors(tiny.parent / "tuned" / "tune.safetensors")[0]
    for name, value in end.items():
        if name.startswith("net/"):
            source = start.get(name.replace("net/", "ema/main/"), start[name])
            torch.testing.assert_close(value, source, rtol=1e-5, atol=1e-7)


def test_bundle_of_another_architecture_is_exit_3_naming_the_key(fastcm_cli, tiny, finished):
    failed = fastcm_cli(
        "train", tiny, f"phases.pretrain.init={finished / 'model.safetensors'}", "network.model_channels=16", "--out", "x"
    )
    assert failed.returncode == 3
    assert "network.model_channels is 8, this run needs 16" in failed.stderr
    assert "the file belongs to another architecture" in failed.stderr


def test_missing_initial_bundle_is_exit_3(fastcm_cli, tiny):
    failed = fastcm_cli("train", tiny, "phases.pretrain.init=nowhere.safetensors", "--out", "x")
    assert failed.returncode == 3
    assert failed.stderr.strip().splitlines()[-1] == "fastcm: error: nowhere.safetensors: no such file"


def test_second_run_in_a_busy_folder_is_refused(fastcm_cli, tiny):
    import fcntl

    (tiny.parent / "busy").mkdir()
    with (tiny.parent / "busy" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = fastcm_cli("train", tiny, "--out", "busy")
    assert failed.returncode == 3
    assert "another process" in failed.stderr


def test_full_disk_while_training_is_exit_3_and_the_previous_save_survives(fastcm_cli, tiny, finished):
    # A real limit on the file size stands in for a full disk: writes past it fail with an OS error.
    limit = (finished / "checkpoints" / "000000000320" / "state.safetensors").stat().st_size // 2
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from fastcm.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "train", str(tiny), "phases.tune.duration_images=192", "--out", str(finished)]
    failed = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert failed.returncode == 3, failed.stderr
    assert "cannot write" in failed.stderr
    assert "untouched" in failed.stderr
    tensors, state = load_newest(finished / "checkpoints")
    assert state["images"] == 128
    assert tensors
    assert not list(finished.rglob(".*tmp*"))


def test_network_that_the_images_cannot_pass_through_is_exit_2(fastcm_cli, tiny):
    failed = fastcm_cli("train", tiny, "network.channel_mult=[1,1,1,1,1,1]", "--out", "x")
    assert failed.returncode == 2
    assert "network:" in failed.stderr


def test_cuda_without_a_gpu_is_exit_2(fastcm_cli, tiny):
    failed = fastcm_cli("train", tiny, "compute.device=cuda", "--out", "x")
    assert failed.returncode == 2
    assert "compute.device" in failed.stderr


def test_missing_data_is_exit_3(fastcm_cli, tiny):
    failed = fastcm_cli("train", tiny, "data.kind=cifar10", "data.path=nowhere", "--out", "x")
    assert failed.returncode == 3
    assert "nowhere" in failed.stderr
    assert "Traceback" not in failed.stderr
