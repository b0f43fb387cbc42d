"""Sets in memory: fingerprints, memory limits, and finding every bad image before training."""

import numpy as np
import pytest
import torch

from fastcm.data import load_resident, open_source
from fastcm.data.sources.base import ArraySource, Source
from fastcm.errors import ConfigError, DataError


class PartlyBroken(Source):
    name, image_shape, label_dim, labels = "broken", (1, 4, 4), 0, None

    def __init__(self, count: int, bad: set[int]) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def image_name(self, i: int) -> str:
        return f"{i}.png"

    def read(self, i: int) -> np.ndarray:
        if i in self.bad:
            raise DataError(f"{self.image_name(i)} is bad")
        return np.full((4, 4, 1), i % 256, np.uint8)


def array_source(name: str = "a", pixel: int = 0, label: int = 1) -> ArraySource:
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.array([0, 1, label])
    images[2, 3, 3, 2] = pixel
    return ArraySource(name, images, labels, 2)


def test_digits_are_the_embedded_default():
    digits = load_resident(open_source("digits"))
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.image_shape == (1, 8, 8)
    assert digits.label_dim == 10
    assert digits.images.dtype == torch.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.num_bytes == 1797 * 64
    assert len(digits) == 1797


def test_labels_can_be_left_out():
    digits = load_resident(open_source("digits", labels=False))
    assert digits.labels is None
    assert digits.label_dim == 0


def test_decoded_images_keep_their_places_with_many_threads():
    images = load_resident(PartlyBroken(500, set()), num_threads=8).images
    assert torch.equal(images[:, 0, 0, 0], torch.arange(500).byte())


def test_fingerprint_changes_with_pixels_labels_and_class_count_but_not_with_the_name():
    prints = [
        load_resident(source).fingerprint
        for source in (
            array_source(),
            array_source(pixel=1),
            array_source(label=0),
            ArraySource("a", array_source().images, None, 0),
        )
    ]
    assert len(set(prints)) == 4
    assert load_resident(array_source(name="elsewhere")).fingerprint == prints[0]


def test_all_bad_images_are_counted_and_ten_are_named():
    with pytest.raises(DataError) as caught:
        load_resident(PartlyBroken(300, set(range(0, 300, 20))))
    lines = str(caught.value).splitlines()
    assert lines[0] == "broken: 15 of 300 images cannot be used:"
    assert lines[1:11] == [f"  {i}.png is bad" for i in range(0, 200, 20)]
    assert lines[11:] == ["  ... and 5 more"]


def test_one_bad_image_in_the_middle_is_found_before_training():
    with pytest.raises(DataError, match=r"1 of 300 .*\n  123.png is bad$"):
        load_resident(PartlyBroken(300, {123}))


def test_set_that_does_not_fit_is_refused_before_decoding():
    with pytest.raises(ConfigError, match=r"300 images of 1x4x4 need .* GiB of cpu memory, .* allowed"):
        load_resident(PartlyBroken(300, {0}), max_bytes=1000)
    with pytest.raises(ConfigError, match="GiB are allowed"):
        load_resident(PartlyBroken(10**15, {0}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "lmdb", "path": "x"}, ConfigError, "data.kind 'lmdb' is unknown, expected one of digits"),
        ({"kind": "npz"}, ConfigError, "data.path is empty"),
        ({"kind": "folder", "path": "x", "download": True}, ConfigError, "download works for kind cifar10 only"),
        ({"kind": "digits", "resolution": 32}, DataError, "digits: images are 8x8 grey, expected 32x32"),
    ],
)
def test_wrong_request_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        open_source(**arguments)
