"""Hostile and damaged checkpoints: a typed error that says what was found, and no effect, no hang, no allocation."""

import collections
import os
import pickle
import random
import subprocess
import time
import tracemalloc
import zipfile
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import torch
from checkpoint_files import STATE, WRITERS, write_as

from fastcm.errors import CheckpointError
from fastcm.io.torch_files import find_modules, module_state, read_checkpoint


class Canary:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Marked(Canary):
    """Attacks through the state that BUILD sets."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"__setstate__": Canary(self.function, *self.args)}


def payloads(canary: Path) -> dict[str, tuple[str, object]]:
    """What each names, and the object that does it."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    return {
        "system": ("system", Canary(os.system, command)),
        "eval": ("eval", Canary(eval, code)),
        "exec": ("exec", Canary(exec, code)),
        "popen": ("Popen", Canary(subprocess.Popen, ["touch", str(canary)])),
        "run": ("check_output", Canary(subprocess.check_output, ["touch", str(canary)])),
        "load": ("torch.serialization.load", Canary(torch.load, str(canary))),
        "save": ("torch.serialization.save", Canary(torch.save, 1, str(canary))),
        "hub": ("torch.hub.load", Canary(torch.hub.load, str(canary))),
        "script": ("torch.jit._serialization.load", Canary(torch.jit.load, str(canary))),
        "mkdir": ("mkdir", Canary(os.mkdir, str(canary))),
        "state": ("mkdir", Marked(os.mkdir, str(canary))),
        "function of torch": ("torch._utils._import_dotted_name", Canary(torch._utils._import_dotted_name, "os.system")),
    }


def in_persistent_object(payload):
    return files.persistent_object("EDMLoss", {}, inside=[payload])


def in_module(payload):
    module = files.persistent_module(STATE)
    module._modules["model"].attribute = payload
    return module


PLACES = {
    "top": lambda payload: payload,
    "list": lambda payload: [1, {"a": (payload,)}],
    "module": in_module,
    "object": in_persistent_object,
}


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
def test_hostile_object_is_refused_by_name_and_has_no_effect(tmp_path, place, form):
    canary = tmp_path / "canary"
    for refused, payload in payloads(canary).values():
        path = write_as(form, tmp_path / "file", PLACES[place](payload))
        with pytest.raises(CheckpointError, match=rf"file cannot be read .*: it names \S*{refused}, which is none"):
            read_checkpoint(path)
        assert not canary.exists()


def reduced(function: str, *args: bytes) -> bytes:
    module, name = function.rsplit(".", 1)
    return f"c{module}\n{name}\n(".encode() + b"".join(args) + b"tR"


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def binary(value: bytes) -> bytes:
    return b"B" + len(value).to_bytes(4, "little") + value


HEADER = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
OLD_FILE = [*HEADER, pickle.dumps(None, 2), pickle.dumps([], 2)]


def legacy_file(*parts: bytes) -> bytes:
    """Magic number, protocol, system, content, keys, unless others are given for the first ones."""
    return b"".join([*parts, *OLD_FILE[len(parts) :]])


def nested(content: bytes) -> bytes:
    return b"\x80\x03" + reduced("torch.storage._load_from_bytes", binary(content)) + b"."


def test_hostile_pickles_within_files_are_refused(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "file"
    attack = pickle.dumps(Canary(os.mkdir, str(canary)), 2)
    hostile = {f"legacy {place}": legacy_file(*OLD_FILE[:place], attack) for place in range(1, 5)}
    hostile |= {f"nested {place}": nested(legacy_file(*OLD_FILE[:place], attack)) for place in range(5)}
    hostile["nested twice"] = nested(legacy_file(*HEADER, nested(legacy_file())))
    for name, content in hostile.items():
        path.write_bytes(content)
        refused = "torch.storage._load_from_bytes" if name == "nested twice" else r"\S*mkdir"
        with pytest.raises(CheckpointError, match=rf"it names {refused}, which is none"):
            read_checkpoint(path)
        assert not canary.exists()


def storage_id(key: str = "0", count: bytes = b"K\x04", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + count + b"tQ"


STORAGE = storage_id()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Functions of the table with arguments that no writer gives.
        (reduced("builtins.getattr", b"ctorch\nfloat32\n", text("x")), "builtins.getattr for something that is no record"),
        (reduced("builtins.getattr", reduced("torch.Size"), text("x")), "builtins.getattr for something that is no record"),
        (reduced("torch._utils._rebuild_tensor_v2", b"K\x01" * 6), "_rebuild_tensor_v2 with unexpected arguments"),
        (reduced("torch._utils._rebuild_tensor_v2", text("a") + b"K\x00))\x89N"), "_rebuild_tensor_v2 with unexpected"),
        (reduced("torch._utils._rebuild_parameter", b"K\x01" * 3), "a parameter is not made of a tensor"),
        (reduced("torch.Size", b"(" + text("a") + b"t"), "torch.Size with unexpected arguments"),
        (reduced("torch.storage._load_from_bytes", text("a")), "_load_from_bytes gets a str, expected bytes"),
        (reduced("torch_utils.persistence._reconstruct_persistent_obj", b"}"), "lacks its class name or its attributes"),
        (reduced("torch_utils.persistence._reconstruct_persistent_obj", b"K\x01"), "lacks its class name"),
        (reduced("dnnlib.util.EasyDict", b"K\x01"), "EasyDict with unexpected arguments"),
        (b"ctorch.nn.modules.module\nModule.forward\n)R", "it names torch.nn.modules.module.Module.forward, which"),
        (b"ctorch.nn.modules.utils\n_pair\n)R", "it names torch.nn.modules.utils._pair, which"),
        (b"ctorch\nnn.Module.forward\n", "it names torch.nn.Module.forward, which"),
        (b"ctorch\nFloatStorage\n)R", "it wants to call a _StorageType"),
        (b"ctorch\nFloatStorage\n}b", "it wants to set attributes of a _StorageType"),
        (b"ctorch\nfloat32\n)R", "it wants to call a dtype"),
        # Persistent ids that are no storage.
        (STORAGE, None),
        (text("os.system") + b"Q", "it refers to an object that is no storage"),
        (storage_id(kind=text("os.system")), "it refers to an object that is no storage"),
        (storage_id("../../x"), "there is nothing"),
        (storage_id(count=b"K\x05"), "claims 20 bytes in 'a/data/0', but there is 16"),
        (storage_id(count=b"J\xff\xff\xff\xff"), "that is no storage"),
        (storage_id(count=b"J\xff\xff\xff\x7f"), "claims 8589934588 bytes"),
        (STORAGE + b"}b", "it wants to set attributes of a _Storage"),
    ],
)
def test_known_names_cannot_be_abused(tmp_path, content, message):
    members = {"a/data.pkl": b"\x80\x02" + content + b".", "a/data/0": bytes(16), "a/byteorder": b"little"}
    path = write_zip(tmp_path / "a.pt", members)
    if message is None:
        assert type(read_checkpoint(path)).__name__ == "_Storage"
        return
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


@pytest.mark.parametrize(
    ("offset", "size", "stride", "fits"),
    [
        (0, (2, 2), (2, 1), True),
        (3, (1,), (1,), True),
        (0, (0, 1 << 40), (1, 1), True),
        (4, (1,), (1,), False),
        (1, (2, 2), (2, 1), False),
        (0, (2, 2), (3, 1), False),
        (0, (5,), (0,), False),
        (0, (1 << 31,), (0,), False),
        (0, (1 << 40, 1 << 40), (1, 1), False),
        (-1, (1,), (1,), False),
        (0, (-1,), (1,), False),
        (1, (2,), (-1,), False),
        (0, (2,), (), False),
        (0, (1,) * 65, (1,) * 65, False),
        (1 << 70, (1,), (1,), False),
    ],
)
def test_tensor_must_lie_within_its_storage(tmp_path, offset, size, stride, fits):
    shape = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    content = b"\x80\x02" + reduced("torch._utils._rebuild_tensor_v2", STORAGE + number(offset) + shape + b"\x89N") + b"."
    path = write_zip(tmp_path / "a.pt", {"a/data.pkl": content, "a/data/0": np.arange(4, dtype=np.float32).tobytes()})
    if fits:
        assert read_checkpoint(path).shape == size
        return
    with pytest.raises(CheckpointError, match=r"beyond its storage of 4 elements|a shape, strides or an offset that are none"):
        read_checkpoint(path)


SIMPLE = b"\x80\x02N."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"<?xml version='1.0'?><Error/>", "it is a web page"),
        (b"\x1f\x8b\x08\0\0", "it is compressed"),
        (b"\x10\0\0\0\0\0\0\0{}              ", "it is a safetensors file"),
        (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "it is damaged"),
        (b"PK\x03\x04 and nothing", "it is a damaged or truncated zip file"),
        (b"hello, I am no checkpoint", "it is damaged|is refused"),
        (legacy_file(SIMPLE), "it is damaged|magic"),
        (legacy_file(HEADER[0], pickle.dumps(1002, 2)), "its protocol is not 1001"),
        (legacy_file(*HEADER[:2], pickle.dumps({"little_endian": False}, 2)), "little-endian"),
        (legacy_file()[:-4] + pickle.dumps(["1"], 2), "its list of storages does not fit"),
    ],
    ids=range(14),
)
def test_what_is_no_checkpoint_is_said(tmp_path, content, message):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    if content == legacy_file(SIMPLE):
        assert read_checkpoint(path) is None
        return
    with pytest.raises(CheckpointError, match=rf"model.pkl cannot be read as a checkpoint: .*({message})"):
        read_checkpoint(path)


def test_missing_file_folder_and_pipe_are_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.pkl", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="no such file, expected a checkpoint"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"dataset.json": b"{}"}, "none of torch.save: there must be one data.pkl"),
        ({"a/data.pkl": SIMPLE, "b/data.pkl": SIMPLE}, "there must be one data.pkl"),
        ({"data.pkl": SIMPLE}, "there must be one data.pkl"),
        ({"a/data.pkl": SIMPLE, "a/constants.pkl": SIMPLE}, "it is a TorchScript program"),
        ({"a/data.pkl": SIMPLE, "a/byteorder": b"big"}, "big-endian"),
        ({"a/data.pkl": b"\x80\x02"}, "it is damaged"),
    ],
)
def test_zip_that_is_no_torch_file_is_said(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=rf"a.zip cannot be read as a checkpoint: .*{message}"):
        read_checkpoint(write_zip(tmp_path / "a.zip", members))


def test_compressed_and_overlapping_members_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.pt", {"a/data.pkl": SIMPLE, "a/data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"'a/data.pkl' in it is compressed"):
        read_checkpoint(path)
    path = write_zip(tmp_path / "b.pt", {"a/data.pkl": SIMPLE, "a/data/0": bytes(64)})
    content = path.read_bytes()
    # Both sizes in the directory at the end claim 2 GB.
    at = content.rindex(b"PK\x01\x02") + 20
    path.write_bytes(content[:at] + (1 << 31).to_bytes(4, "little") * 2 + content[at + 8 :])
    with pytest.raises(CheckpointError, match=r"claim more bytes than the file has|damaged or truncated zip"):
        read_checkpoint(path)


def test_claim_of_gigabytes_allocates_nothing(tmp_path):
    storage = storage_id(count=b"J\x00\x00\x00\x20")
    tensor = b"\x80\x02" + reduced("torch._utils._rebuild_tensor_v2", storage + b"K\x00(J\x00\x00\x00\x20t(K\x01t\x89N") + b"."
    old = legacy_file(*HEADER, tensor, pickle.dumps(["0"], 2)) + (1 << 29).to_bytes(8, "little")
    within = nested(legacy_file(*HEADER, b"\x80\x02" + storage + b"."))
    for content in (old, within):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="its tensors claim 2147483648 bytes or more, but only"):
            read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="claims 2147483648 bytes in 'a/data/0', but there is 8 bytes"):
        read_checkpoint(write_zip(tmp_path / "a.pt", {"a/data.pkl": tensor, "a/data/0": bytes(8)}))


@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_files_give_the_error_and_nothing_else(tmp_path, writer):
    path = WRITERS[writer](tmp_path / "file")
    content = path.read_bytes()
    tracemalloc.start()
    for length in {*range(0, len(content), max(1, len(content) // 150)), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="file cannot be read as a checkpoint"):
            read_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("writer", WRITERS)
def test_flipped_bits_give_a_result_or_the_error(tmp_path, writer):
    path = WRITERS[writer](tmp_path / "file")
    content, generator = path.read_bytes(), random.Random(0)
    started = time.process_time()
    for _ in range(250):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            for module in find_modules(read_checkpoint(path)).values():
                module_state(module)
        except CheckpointError:
            continue
    assert time.process_time() - started < 60


def test_damaged_weights_in_a_zip_are_noticed(tmp_path):
    path = files.write_state_dict(tmp_path / "a.pt", STATE)
    content = path.read_bytes()
    at = content.index(STATE["model.enc.8x8_conv.weight"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        read_checkpoint(path)
