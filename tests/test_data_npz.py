"""Images in NumPy archives."""

import contextlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from fastcm.data import load_resident, open_source
from fastcm.errors import DataError

IMAGES = np.ascontiguousarray(
    load_sample_image("china.jpg")[:64, :64].reshape(2, 32, 2, 32, 3).swapaxes(1, 2).reshape(4, 32, 32, 3)
)
LABELS = np.array([2, 0, 1, 2], np.uint8)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("image_key", "label_key"), [("images", "labels"), ("x_train", "y_train"), ("x", "y"), ("arr_0", "arr_1")]
)
def test_known_keys_are_read(tmp_path, image_key, label_key):
    dataset = load_resident(open_source("npz", save(tmp_path / "a.npz", **{image_key: IMAGES, label_key: LABELS[:, None]})))
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.label_dim == 3


def test_grey_images_without_channel_axis_and_without_labels(tmp_path):
    dataset = load_resident(open_source("npz", save(tmp_path / "a.npz", images=IMAGES[..., 0])))
    assert dataset.image_shape == (1, 32, 32)
    assert dataset.labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, r"has the keys \['pictures'\], expected images under one of images, x_train"),
        ({"images": IMAGES.astype(np.float32)}, r"images are float32 of shape \(4, 32, 32, 3\), expected uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"channels first; expected channels last: images.transpose\(0, 2, 3, 1\)"),
        ({"images": IMAGES[:0]}, "expected uint8 .* with at least one image"),
        ({"images": IMAGES[0, 0]}, r"expected uint8 \[M, H, W, C\]"),
        ({"images": IMAGES[:, :16]}, "expected square images"),
        ({"images": IMAGES[..., :2]}, r"expected 1 \(grey\) or 3 \(RGB\)"),
        (
            {"images": IMAGES, "labels": LABELS[:3]},
            r"labels are uint8 of shape \(3,\), expected one integer class for each of 4",
        ),
        ({"images": IMAGES, "labels": LABELS / 2}, r"labels are float64"),
        ({"images": IMAGES, "labels": np.array([0, -1, 2, 3])}, r"1 labels are outside .*\n  image 1 has label -1"),
        ({"images": np.array([{}, []], dtype=object)}, "not an .npz archive of plain arrays, or it is damaged"),
    ],
)
def test_unusable_arrays_are_explained(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        open_source("npz", save(tmp_path / "a.npz", **arrays))


def test_damaged_file_never_raises_anything_but_data_errors(tmp_path):
    path = save(tmp_path / "a.npz", images=IMAGES[:1, :4, :4], labels=LABELS[:1])
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        with contextlib.suppress(DataError):
            open_source("npz", path)
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a\.npz"):
            open_source("npz", path)


def test_single_array_file_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(DataError, match=r"not an \.npz archive"):
        open_source("npz", tmp_path / "a.npy")
