"""CIFAR-10 in all its layouts, with small stand-ins of the official files; pickles must not be able to do anything."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from fastcm.data import load_resident, open_source
from fastcm.data.sources import cifar10
from fastcm.errors import DataError

COUNT = 2
CHINA = load_sample_image("china.jpg")[100:]
IMAGES = np.stack([CHINA[32 * i : 32 * i + 32, 32 * i : 32 * i + 32] for i in range(5 * COUNT)])
LABELS = np.arange(5 * COUNT) % 10
PLANES = IMAGES.transpose(0, 3, 1, 2).reshape(5, COUNT, 3072)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cifar10, "IMAGES_PER_BATCH", COUNT)


def binary_files() -> dict[str, bytes]:
    rows = np.concatenate([LABELS.reshape(5, COUNT, 1).astype(np.uint8), PLANES], axis=2)
    return {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": rows[i].tobytes() for i in range(5)}


def python_batch(i: int, protocol: int) -> bytes:
    labels = LABELS.reshape(5, COUNT)[i].tolist()
    # Protocol 2 writes names that only an old numpy has; the official files do the same.
    content = pickle.dumps({"data": PLANES[i], "labels": labels, "batch_label": f"batch {i}"}, protocol)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol == 2 else content


def python_files(protocol: int = 2) -> dict[str, bytes]:
    return {f"cifar-10-batches-py/data_batch_{i + 1}": python_batch(i, protocol) for i in range(5)}


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def assert_is_cifar(path):
    dataset = load_resident(open_source("cifar10", path, resolution=32))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.label_dim == 10


LAYOUTS = {"binary": binary_files, "python": python_files, "python protocol 4": lambda: python_files(4)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_archive_and_extracted_folder_are_read(tmp_path, layout):
    files = LAYOUTS[layout]()
    assert_is_cifar(write_tar(tmp_path / "anything.tar.gz", files))
    folder = write_folder(tmp_path / "extracted", files)
    assert_is_cifar(folder)
    assert_is_cifar(folder / next(iter(files)).split("/")[0])
    write_tar(tmp_path / ("cifar-10-binary.tar.gz" if layout == "binary" else "cifar-10-python.tar.gz"), files)
    assert_is_cifar(tmp_path)


def test_npz_is_read_and_must_have_its_size(tmp_path):
    np.savez(tmp_path / "c.npz", images=IMAGES, labels=LABELS)
    assert_is_cifar(tmp_path / "c.npz")
    np.savez(tmp_path / "small.npz", images=IMAGES[:, :8, :8], labels=LABELS)
    with pytest.raises(DataError, match=r"small.npz: images are \(C, H, W\) = \(3, 8, 8\), expected \(3, 32, 32\)"):
        open_source("cifar10", tmp_path / "small.npz")


def test_missing_set_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-10 here, expected cifar-10-binary.tar.gz .*set data.download=true"):
        open_source("cifar10", tmp_path / "nowhere")


def test_missing_and_short_batches_are_named(tmp_path):
    files = binary_files()
    short = {name: content[:-1] if "3" in name else content for name, content in files.items()}
    with pytest.raises(DataError, match=r"data_batch_3.bin has 6145 bytes, expected 6146; it is truncated"):
        open_source("cifar10", write_tar(tmp_path / "short.tar.gz", short))
    del files["cifar-10-batches-bin/data_batch_4.bin"]
    with pytest.raises(DataError, match=r"data_batch_4 missing, expected data_batch_1 to data_batch_5"):
        open_source("cifar10", write_tar(tmp_path / "part.tar.gz", files))


def test_label_out_of_range_is_named(tmp_path):
    files = binary_files()
    name = "cifar-10-batches-bin/data_batch_1.bin"
    files[name] = b"\x0b" + files[name][1:]
    with pytest.raises(DataError, match=r"1 labels are outside \[0, 10\):\n  image 0 has label 11"):
        open_source("cifar10", write_tar(tmp_path / "a.tar.gz", files))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_archive_is_named(tmp_path, layout):
    path = write_tar(tmp_path / "a.tar.gz", LAYOUTS[layout]())
    content = path.read_bytes()
    for keep in (0, 5, len(content) // 3, len(content) // 2):
        path.write_bytes(content[:keep])
        with pytest.raises(DataError, match=r"a.tar.gz"):
            open_source("cifar10", path)


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, path, function):
        self.path, self.function = str(path), function

    def __reduce__(self):
        return self.function, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, io.open, np.save])
def test_hostile_pickle_does_nothing(tmp_path, protocol, function):
    canary = tmp_path / "canary"
    argument = f"touch {canary}" if function is os.system else canary
    files = python_files() | {"cifar-10-batches-py/data_batch_1": pickle.dumps({"data": Canary(argument, function)}, protocol)}
    with pytest.raises(DataError, match=r"data_batch_1 is not a CIFAR-10 Python batch: UnpicklingError: it names \S+, which"):
        open_source("cifar10", write_tar(tmp_path / "a.tar.gz", files))
    assert not canary.exists()


@pytest.mark.parametrize(
    "program",
    [
        # Each tries to change a stand-in, call through one, or reach one's attributes.
        b"cnumpy\nndarray\n(NI1\nd\x86b.",
        b"cnumpy\nndarray\n(N(Vargs\nI1\ndtb.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__dict__\x93.",
        b"c_codecs\nencode\n(Vprint(1)\ntR(NI1\ntb.",
        b"\x80\x02\x82\x01.",
        b"Pdata\n.",
        b"cnumpy\nndarray\nI0\nI1\ns.",
        b"",
        b"\x80\x04N.",
    ],
)
def test_crafted_pickle_changes_nothing(tmp_path, program):
    hostile = python_files() | {"cifar-10-batches-py/data_batch_1": program}
    with pytest.raises(DataError, match="data_batch_1 is not a CIFAR-10 Python batch"):
        open_source("cifar10", write_tar(tmp_path / "a.tar.gz", hostile))
    assert_is_cifar(write_tar(tmp_path / "b.tar.gz", python_files()))


def serve(tmp_path, monkeypatch, md5=None):
    content = write_tar(tmp_path / "made.tar.gz", binary_files()).read_bytes()
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "cifar-10-binary.tar.gz").write_bytes(content)
    monkeypatch.setattr(cifar10, "URL", (tmp_path / "server").as_uri() + "/")
    monkeypatch.setitem(cifar10.ARCHIVES, "cifar-10-binary.tar.gz", md5 or hashlib.md5(content).hexdigest())


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch)
    dataset = load_resident(open_source("cifar10", tmp_path / "new" / "place", download=True))
    assert len(dataset) == 5 * COUNT
    assert [path.name for path in (tmp_path / "new" / "place").iterdir()] == ["cifar-10-binary.tar.gz"]
    assert_is_cifar(tmp_path / "new" / "place")


def test_download_with_a_wrong_checksum_leaves_nothing_behind(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch, md5="0" * 32)
    with pytest.raises(DataError, match=r"has md5 [0-9a-f]{32}, expected 0{32}: the download is damaged"):
        open_source("cifar10", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch)
    (tmp_path / "server" / "cifar-10-binary.tar.gz").unlink()
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz cannot be fetched to .*check the network"):
        open_source("cifar10", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch)
    with pytest.raises(DataError, match="no CIFAR-10 here"):
        open_source("cifar10", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_official_checksums_are_pinned():
    assert cifar10.ARCHIVES == {
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    }
