"""Checkpoints and bundles: written whole or not at all, verified before use."""

import json
import os

import pytest
import torch

from fastcm.errors import CheckpointError
from fastcm.io import atomic
from fastcm.io.tensors import copy_into, read_tensors, write_tensors
from fastcm.train.checkpoint import list_checkpoints, load_newest, save_checkpoint

TENSORS = {"a": torch.arange(5.0), "b": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)}


def save(folder, images, scale=1.0, keep=2):
    return save_checkpoint(folder, images, {k: v * scale for k, v in TENSORS.items()}, {"images": images}, keep)


def test_newest_checkpoint_comes_back_with_its_state(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 200, 2.0)
    tensors, state = load_newest(tmp_path)
    assert state["images"] == 200
    assert all(torch.equal(tensors[name], value * 2) for name, value in TENSORS.items())


def test_only_the_newest_are_kept(tmp_path):
    for images in (1, 2, 3, 4):
        save(tmp_path, images)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["000000000003", "000000000004"]


def test_empty_folder_has_no_checkpoint(tmp_path):
    assert load_newest(tmp_path) is None


def _truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda folder: _truncate(folder / "state.safetensors"),
    "bit flipped": lambda folder: _flip_a_bit(folder / "state.safetensors"),
    "emptied": lambda folder: (folder / "state.safetensors").write_bytes(b""),
    "state deleted": lambda folder: (folder / "state.safetensors").unlink(),
    "manifest deleted": lambda folder: (folder / "manifest.json").unlink(),
    "manifest not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text('{"files": {"state.safetensors": 3}}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_newest_is_skipped_with_a_warning_for_the_one_before(tmp_path, caplog, damage):
    save(tmp_path, 100)
    damage(save(tmp_path, 200))
    _, state = load_newest(tmp_path)
    assert state["images"] == 100
    assert "checkpoint skipped" in caplog.text


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    for images in (100, 200):
        DAMAGE["truncated"](save(tmp_path, images))
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*000200.*000100"):
        load_newest(tmp_path)


def test_foreign_names_are_ignored(tmp_path):
    save(tmp_path, 100)
    (tmp_path / "000000000300.bak").mkdir()
    (tmp_path / ".tmp-000000000400-1").mkdir()
    assert load_newest(tmp_path)[1]["images"] == 100


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch, when):
    save(tmp_path, 100)

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "write":
            patch.setattr("fastcm.io.tensors.save_file", refuse)
        elif when == "sync":
            patch.setattr(atomic.os, "fsync", refuse)
        else:
            patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path, 200)
    assert [path.name for path in tmp_path.iterdir()] == ["000000000100"]
    assert load_newest(tmp_path)[1]["images"] == 100


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path):
    first = (save(tmp_path, 100) / "state.safetensors").read_bytes()
    assert (save(tmp_path, 100) / "state.safetensors").read_bytes() == first


def test_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not one that fastcm wrote"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"garbage", (1 << 40).to_bytes(8, "little") + b"{}", json.dumps({}).encode()])
def test_file_that_is_no_safetensors_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged or cut short"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("a"), "'net/a' is missing"),
        (lambda t: t.update(c=torch.zeros(1)), "'net/c' is not part of this network"),
        (lambda t: t.update(a=torch.zeros(6)), r"'net/a' has shape \(6,\), this network needs \(5,\)"),
    ],
)
def test_tensors_of_another_architecture_are_refused_and_nothing_is_copied(tmp_path, change, expected):
    other = dict(TENSORS)
    change(other)
    write_tensors(tmp_path / "x", {f"net/{k}": v for k, v in other.items()}, {})
    targets = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    with pytest.raises(CheckpointError, match=expected):
        copy_into(targets, read_tensors(tmp_path / "x")[0], "net/", tmp_path / "x")
    assert all(not target.any() for target in targets.values())


def test_memory_format_survives_a_round_trip(tmp_path):
    write_tensors(tmp_path / "x", {f"net/{k}": v for k, v in TENSORS.items()}, {})
    targets = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    copy_into(targets, read_tensors(tmp_path / "x")[0], "net/", tmp_path / "x")
    assert targets["b"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(targets["b"], TENSORS["b"])
