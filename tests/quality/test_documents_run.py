"""README's Python runs as it stands, and so do its commands that need no published file and no long training."""

import shlex

import pytest
import torch
from convert_cases import edm_pickle
from integration_cases import SMALL, header_of, write_bundle
from test_documents import FASTCM_COMMANDS, blocks

import fastcm
from fastcm.cli import main
from fastcm.model import SamplingDefaults

TINY = {"family": "ddpmpp", "model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
TRAINED = {"phase": "tune", "images": 7, "data": "digits"}
EDM = {"preconditioner": {"kind": "edm", "sigma_data": 0.5}, "trained": TRAINED, "image_shape": (1, 8, 8)}

# What stands at the paths that README names.
STAND_INS = {
    "runs/digits/model.safetensors": header_of(TINY, trained=TRAINED, image_shape=(1, 8, 8)),
    "runs/ctm_digits/model.safetensors": header_of(
        {**TINY, "second_time": True}, **EDM, sampling=SamplingDefaults("trajectory"), trajectory={}
    ),
    "edm.safetensors": header_of(TINY, **EDM, sampling=SamplingDefaults("heun")),
    "cd.safetensors": header_of(SMALL),
    "runs/x/model.safetensors": header_of(SMALL),
}
PICKLE = "edm-cifar10-32x32-uncond-vp.pkl"
# These train for minutes (dry runs are tested elsewhere), measure, or need files that are too large to make.
LONG = ("train", "ema", "likelihood", "bench tune", "bench kernels group_norm", "convert cd_imagenet64")
COMMANDS = [command for command in FASTCM_COMMANDS if not command.startswith(LONG)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with all that README names."""
    monkeypatch.chdir(tmp_path)
    for path, header in STAND_INS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_bundle(tmp_path / path, header)
    edm_pickle("A_VPPrecond")(tmp_path / PICKLE)
    return tmp_path


def test_python_blocks_run_in_order(folder):
    """Each block finds the names of those before it, and what its text says is given."""
    channels = {name: torch.randn(2, 64) for name in ("scale", "shift")} | {"weight": torch.ones(64), "bias": torch.zeros(64)}
    given = [
        {},
        {"model": fastcm.load("runs/ctm_digits"), "x_t": 80 * torch.randn(2, 1, 8, 8)},
        {**channels, "x": torch.randn(2, 64, 8, 8), "qkv": torch.randn(2, 3 * 48, 4, 4)},
    ]
    names = {}
    for code, more in zip(blocks("python"), given, strict=True):
        names |= more
        exec(compile(code, "README.md", "exec"), names)
    shapes = {name: tuple(names[name].shape) for name in ("images", "denoised", "x_s", "y", "out")}
    assert shapes == {
        "images": (16, 1, 8, 8), "denoised": (16, 1, 8, 8), "x_s": (2, 1, 8, 8), "y": (2, 64, 8, 8), "out": (2, 48, 4, 4),
    }  # fmt: skip
    assert all(names[name].isfinite().all() for name in shapes)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, folder, capsys):
    few = ["--num", "4"] if command.startswith("sample") and "--num" not in command else []
    main([*shlex.split(command), *few])
    assert capsys.readouterr().out


def test_most_commands_are_run():
    assert {command.split()[0] for command in COMMANDS} == {"sample", "evaluate", "info", "convert", "export", "bench"}
