"""The real training in small: stages, resuming, distances, nearest images; the arithmetic in the configuration's comment."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cifar10_20min
from benchmarks.cifar10_20min import Job, distance, nearest, run_stages, show
from fastcm.bench import shapes
from fastcm.config import load_config
from fastcm.train.run_folder import RunFolder

ROOT = Path(__file__).parents[2]

TOOL = """
import sys
import numpy as np
def features(images):
    return images.reshape(len(images), -1)[:, :2].astype(float)
if __name__ == "__main__":
    a, b = (np.load(path)["images"] for path in sys.argv[1:])
    print("distance", abs(a.mean() - b.mean()) + 0.25)
"""


def tool_in(folder, text=TOOL):
    path = folder / "tool.py"
    path.write_text(text)
    return path


def random_images(num, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)


def job_in(folder, tool=None):
    np.savez(folder / "data.npz", images=random_images(40))
    (folder / "run").mkdir()
    return Job(folder / "data.npz", tool, RunFolder(folder / "run"), folder, 16, ())


def test_stages_are_done_once_and_times_go_on():
    calls, saved, result = [], [], {"stages": {"a": {"seconds": 100.0, "done": False}}}

    def broken():
        calls.append("b")
        raise RuntimeError("no luck")

    stages = {"a": lambda: calls.append("a") or {"value": 1}, "b": broken}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            run_stages(stages, result, lambda: saved.append(json.dumps(result)))
    assert calls == ["a", "b", "b"]
    assert result["stages"]["a"]["value"] == 1
    assert result["stages"]["a"]["seconds"] >= 100.0
    assert (result["stages"]["a"]["done"], result["stages"]["b"]["done"]) == (True, False)
    assert json.loads(saved[-1]) == result


def test_nearest_is_by_euclidean_distance():
    index, distances = nearest(np.array([[0.0, 0.0], [10.0, 0.0]]), np.array([[3.0, 4.0], [9.0, 0.0], [-6.0, 0.0]]))
    assert index.tolist() == [0, 1]
    assert distances.tolist() == [5.0, 1.0]


def test_distances_and_nearest_images_are_those_of_the_tool(tmp_path):
    job = job_in(tmp_path, tool_in(tmp_path))
    real = random_images(40)
    for name in cifar10_20min.SETS:
        np.savez(job.samples(name), images=real[5:21])
    measured = cifar10_20min.measure(job)
    assert set(measured["distances"]) == {*cifar10_20min.SETS, "real against real (halves)"}
    expected = abs(real[5:21].mean() - real.mean()) + 0.25
    assert measured["distances"]["1 step"] == pytest.approx(expected)
    found = show(job)["nearest"]
    assert found["pixels"]["index"] == list(range(5, 21))  # copies of training images are found
    assert found["pixels"]["distance"] == [0.0] * 16
    assert found["features"]["distance"] == [0.0] * 16
    assert {"cifar10_20min.png", "cifar10_20min_nearest.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_tool_that_prints_no_number_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="printed no number: oh"):
        distance(tool_in(tmp_path, "print('oh no')"), tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match="ended with 3"):
        distance(tool_in(tmp_path, "print(1.5); raise SystemExit(3)"), tmp_path, tmp_path)


def test_without_a_tool_there_are_no_distances(tmp_path):
    assert cifar10_20min.measure(job_in(tmp_path)) == {"distances": {}}
    assert cifar10_20min.features_of(None) is None


def test_without_a_gpu_it_ends_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cifar10_20min", "--data", "x"])
    monkeypatch.setattr(cifar10_20min.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cifar10_20min.main()
    assert ended.value.code == 2
    assert "--smoke" in capsys.readouterr().err


def gflop(num_blocks, monkeypatch):
    monkeypatch.setitem(shapes.ALL_SETS, "tried", ("cifar10_20min", (3, 32, 32), 0, 9))
    network = load_config("cifar10_20min").network.model_copy(update={"num_blocks": num_blocks})
    monkeypatch.setattr(shapes, "load_config", lambda name: type("C", (), {"network": network}))
    return sum(calls * shape.flops_per_image for shape, calls in shapes.conv_calls("tried").items()) / 1e9


def test_the_arithmetic_of_the_configuration_is_right(monkeypatch):
    config = load_config("cifar10_20min")
    wide, ours = gflop(4, monkeypatch), gflop(config.network.num_blocks, monkeypatch)
    ect = 2630 * wide / ours
    edm = ect * 4 / 3
    seconds = [config.phases["pretrain"].duration_images / edm, config.phases["tune"].duration_images / ect]
    comment = (ROOT / "configs" / "cifar10_20min.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    assert re.search(rf"DDPM\+\+ \({wide:.1f} GFLOP .*take {ours:.1f} GFLOP", comment)
    assert re.search(rf"ECT runs at {round(ect, -1):,.0f} images/s and EDM, three passes, at {round(edm, -1):,.0f}", comment)
    assert f"in {seconds[0]:.0f} s and 1.536 Mimg in {seconds[1]:.0f} s, {sum(seconds) / 60:.1f} min" in comment
    assert f"leaves {20 - sum(seconds) / 60:.1f} min" in comment
    assert f"{2630 * 4 * wide / 1e3:.0f} TFLOP/s" in comment
    assert "Predicted, not measured" in comment


@pytest.mark.slow
def test_the_smoke_run_does_every_stage_and_goes_on(tmp_path):
    data, path = job_in(tmp_path).data, tmp_path / "r.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.cifar10_20min",
        "--data",
        str(data),
        "--fd-tool",
        str(tool_in(tmp_path)),
        "--smoke",
    ]
    command += ["--run", str(tmp_path / "run"), "--json", str(path), "--num", "16"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    result = json.loads(path.read_text())
    assert all(stage["done"] for stage in result["stages"].values())
    assert list(result["stages"]) == ["train", *(f"sample {name}" for name in cifar10_20min.SETS), "measure", "show"]
    assert all(len(points) >= 2 for points in result["stages"]["train"]["curves"].values())
    assert result["smoke"]
