"""Image sets in zip archives and folders: round trips, and each kind of bad input with its message."""

import io
import json
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fastcm.data import load_resident, open_source
from fastcm.errors import DataError

CHINA = load_sample_image("china.jpg")[200:]
PATCHES = [np.ascontiguousarray(CHINA[32 * y : 32 * y + 32, 32 * x : 32 * x + 32]) for y in range(4) for x in range(3)]
NAMES = [f"{i // 5:05d}/img{i:08d}.png" for i in range(12)]
LABELS = [[name, i % 4] for i, name in enumerate(NAMES)]


def encode(pixels, format="PNG", mode=None, **options) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def png16() -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0), b"".join(b"\0" + bytes(32 * 6) for _ in range(32))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PNGS = dict(zip(NAMES, map(encode, PATCHES), strict=True))


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def write_zip(path, files, index=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if index is not None:
            archive.writestr("dataset.json", index if isinstance(index, str) else json.dumps(index))
    return path


def write_folder(path, files):
    for name, content in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


def load(kind, path, **options):
    return load_resident(open_source(kind, path, **options))


def assert_is_patches(dataset):
    assert torch.equal(dataset.images, torch.from_numpy(np.stack(PATCHES)))


def test_edm_zip_and_its_extracted_folder_are_the_same_set(tmp_path):
    zipped = load("edm_zip", write_zip(tmp_path / "set.zip", PNGS, {"labels": LABELS}), resolution=32)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        archive.extractall(tmp_path / "elsewhere")
    folder = load("edm_zip", tmp_path / "elsewhere")
    for dataset in (zipped, folder):
        assert_is_patches(dataset)
        assert dataset.labels.tolist() == [label for _, label in LABELS]
        assert dataset.label_dim == 4
    assert zipped.fingerprint == folder.fingerprint


@pytest.mark.parametrize("index", [None, {"labels": None}])
def test_edm_zip_without_labels_has_no_classes(tmp_path, index):
    dataset = load("edm_zip", write_zip(tmp_path / "set.zip", PNGS, index))
    assert_is_patches(dataset)
    assert dataset.labels is None


def test_labels_that_are_not_wanted_are_not_checked(tmp_path):
    assert load("edm_zip", write_zip(tmp_path / "set.zip", PNGS, "nonsense"), labels=False).label_dim == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "dataset.json cannot be read as JSON"),
        ({"classes": []}, 'dataset.json has no key "labels"'),
        ([], 'dataset.json has no key "labels"'),
        ({"labels": {"a": 1}}, '"labels" is dict, expected a list'),
        ({"labels": [*LABELS[:-1], [NAMES[-1], 0.5]]}, r"1 entries are not \[name, integer class\].*\n.*0.5"),
        ({"labels": [*LABELS[:-1], [NAMES[-1], True]]}, r"1 entries are not \[name, integer class\]"),
        ({"labels": LABELS[:-2]}, rf"2 images have no label.*:\n  {NAMES[10]}\n  {NAMES[11]}$"),
        ({"labels": [*LABELS, ["00009/none.png", 0]]}, r"1 labels are for images that do not exist:\n  00009/none.png"),
        ({"labels": [*LABELS, LABELS[3]]}, rf"1 images are labelled more than once:\n  {NAMES[3]}"),
        ({"labels": [*LABELS[:-1], [NAMES[-1], -1]]}, r"1 labels are outside \[0, 100000\):\n  image 11 has label -1"),
        ({"labels": [*LABELS[:-1], [NAMES[-1], 10**30]]}, r"1 labels are outside \[0, 100000\)"),
    ],
)
def test_bad_labels_are_named(tmp_path, index, message):
    with pytest.raises(DataError, match=rf"set\.zip: dataset\.json.*{message}|set\.zip: {message}"):
        load("edm_zip", write_zip(tmp_path / "set.zip", PNGS, index))


def test_labels_below_the_top_level_are_not_silently_ignored(tmp_path):
    files = {f"cifar/{name}": data for name, data in PNGS.items()} | {"cifar/dataset.json": b"{}"}
    with pytest.raises(DataError, match=r"found cifar/dataset.json, expected dataset.json at the top level"):
        load("edm_zip", write_zip(tmp_path / "set.zip", files))


BAD_IMAGES = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "truncated": (PNGS[NAMES[5]][:700], "cannot be decoded"),
    "no image": (b"hello" * 99, r"cannot be decoded \(UnidentifiedImageError"),
    "checksum": (flipped(PNGS[NAMES[5]], 900), "cannot be decoded"),
    "smaller": (encode(PATCHES[5][:16, :16]), "is 16x16 RGB, expected 32x32 RGB like 00000/img00000000.png; all images"),
    "not square": (encode(PATCHES[5][:16]), "is 32x16 RGB, expected 32x32 RGB"),
    "grey": (encode(PATCHES[5], mode="L"), "is 32x32 grey, expected 32x32 RGB"),
    "alpha": (encode(PATCHES[5], mode="RGBA"), "has an alpha channel; flatten it onto a background and save it as RGB"),
    "grey alpha": (encode(PATCHES[5], mode="LA"), "has an alpha channel; flatten it"),
    "transparent": (encode(PATCHES[5], transparency=(0, 0, 0)), "has an alpha channel"),
    "16 bits grey": (encode(PATCHES[5][..., 0].astype(np.uint16)), "has 16 bits per channel; convert it to 8 bits"),
    "16 bits RGB": (png16(), "has 16 bits per channel; convert it to 8 bits"),
    "cmyk": (encode(PATCHES[5], "JPEG", "CMYK"), "is CMYK; convert it to RGB"),
    "animated": (
        encode(PATCHES[5], save_all=True, append_images=[Image.fromarray(PATCHES[6])]),
        r"is animated \(2 frames\); save one frame",
    ),
}


@pytest.mark.parametrize("container", ["zip", "folder"])
@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_bad_image_is_named_with_what_is_wrong(tmp_path, container, bad):
    content, message = BAD_IMAGES[bad]
    files = PNGS | {NAMES[5]: content}
    path = write_zip(tmp_path / "set.zip", files) if container == "zip" else write_folder(tmp_path / "set", files)
    with pytest.raises(DataError, match=rf"1 of 12 images cannot be used:\n  {NAMES[5]} {message}"):
        load("edm_zip", path)


def test_bad_first_image_does_not_hide_the_others(tmp_path):
    files = PNGS | {NAMES[0]: b"", NAMES[7]: b"x"}
    with pytest.raises(DataError, match=rf"2 of 12 images cannot be used:\n  {NAMES[0]} is empty.*\n  {NAMES[7]} cannot be"):
        load("edm_zip", write_zip(tmp_path / "set.zip", files))


def test_set_of_only_bad_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no image can be read \(of 12\):\n"):
        load("edm_zip", write_zip(tmp_path / "set.zip", dict.fromkeys(NAMES, b"")))


def test_non_square_set_is_refused(tmp_path):
    files = {name: encode(patch[:16]) for name, patch in zip(NAMES, PATCHES, strict=True)}
    with pytest.raises(DataError, match=rf"{NAMES[0]}: 32x16 with 3 channel\(s\), expected square images; crop or resize"):
        load("edm_zip", write_zip(tmp_path / "set.zip", files))


def test_palette_and_bilevel_images_are_converted_without_loss(tmp_path):
    palette = Image.fromarray(PATCHES[0]).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert np.array_equal(load("folder", write_folder(tmp_path / "p", {"a.png": buffer.getvalue()})).images[0], expected)
    bilevel = encode(PATCHES[0], mode="1")
    assert set(load("folder", write_folder(tmp_path / "b", {"a.png": bilevel})).images.unique().tolist()) == {0, 255}


def test_rotation_noted_by_a_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(PATCHES[0], "JPEG", quality=100, subsampling=0, exif=exif)
    plain = encode(PATCHES[0], "JPEG", quality=100, subsampling=0)
    dataset = load("folder", write_folder(tmp_path / "set", {"a.jpg": turned, "b.jpg": plain}))
    assert torch.equal(dataset.images[0], dataset.images[1].rot90(-1, (0, 1)))


def test_missing_path_is_named(tmp_path):
    for kind in ("edm_zip", "folder", "npz"):
        with pytest.raises(DataError, match=r"nowhere does not exist"):
            load(kind, tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"no archive", "truncated"])
def test_file_that_is_no_archive_is_named(tmp_path, content):
    path = write_zip(tmp_path / "set.zip", PNGS)
    path.write_bytes(path.read_bytes()[:-100] if content == "truncated" else content)
    with pytest.raises(DataError, match=r"set\.zip \(\d+ bytes\) is not a zip archive, or it is truncated"):
        load("edm_zip", path)


def test_archive_with_a_wrong_checksum_names_the_image(tmp_path):
    path = write_zip(tmp_path / "set.zip", PNGS)
    path.write_bytes(flipped(path.read_bytes(), path.read_bytes().index(PNGS[NAMES[5]]) + 900))
    with pytest.raises(DataError, match=rf"{NAMES[5]} cannot be read from the archive \(Bad CRC-32"):
        load("edm_zip", path)


def test_damaged_archive_never_raises_anything_but_data_errors(tmp_path):
    path = write_zip(tmp_path / "set.zip", dict(list(PNGS.items())[:2]), {"labels": LABELS[:2]})
    content = path.read_bytes()
    for position in range(0, len(content), 37):
        path.write_bytes(flipped(content, position))
        try:
            dataset = load("edm_zip", path)
        except DataError:
            continue
        assert torch.equal(dataset.images, torch.from_numpy(np.stack(PATCHES[:2]))[: len(dataset)])


def test_name_that_occurs_twice_is_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", PNGS)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(NAMES[2], b"")
    with pytest.raises(DataError, match=rf"1 names occur more than once:\n  {NAMES[2]}"):
        load("edm_zip", path)


def test_set_without_images_says_what_was_found(tmp_path):
    with pytest.raises(DataError, match=r"set holds no images: found 2 x \.tiff, 1 x no extension, expected \.png, "):
        load("folder", write_folder(tmp_path / "set", {"a.tiff": b"", "b.tiff": b"", "readme": b""}))
    with pytest.raises(DataError, match="no files at all"):
        load("edm_zip", write_zip(tmp_path / "set.zip", {}))


def test_class_folders_become_labels_in_sorted_order(tmp_path):
    files = {f"{'cat' if i % 2 else 'bird'}/deep/{i:02d}.png": encode(patch) for i, patch in enumerate(PATCHES)}
    dataset = load("folder", write_folder(tmp_path / "set", files))
    assert dataset.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.label_dim == 2
    assert torch.equal(dataset.images[6], torch.from_numpy(PATCHES[1]))
    assert load("folder", write_zip(tmp_path / "set.zip", files)).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("prefix", ["", "only/", "only/deep/"])
def test_flat_or_single_folder_has_no_classes(tmp_path, prefix):
    files = {f"{prefix}{i:02d}.png": encode(patch) for i, patch in enumerate(PATCHES)}
    dataset = load("folder", write_folder(tmp_path / "set", files))
    assert_is_patches(dataset)
    assert dataset.labels is None


def test_images_beside_class_folders_mean_no_classes(tmp_path):
    files = {"a/0.png": PNGS[NAMES[0]], "b/0.png": PNGS[NAMES[1]], "z.png": PNGS[NAMES[2]]}
    assert load("folder", write_folder(tmp_path / "set", files)).labels is None


def test_empty_class_folder_is_refused(tmp_path):
    folder = write_folder(tmp_path / "set", {"a/0.png": PNGS[NAMES[0]], "c/0.png": PNGS[NAMES[1]], "b/notes.txt": b""})
    with pytest.raises(DataError, match="subfolder b holds no images"):
        load("folder", folder)


def test_edm_folder_is_not_mistaken_for_class_folders(tmp_path):
    with pytest.raises(DataError, match=r"holds dataset\.json, so its subfolders are not classes; open it with kind edm_zip"):
        load("folder", write_zip(tmp_path / "set.zip", PNGS, {"labels": None}))


def test_hidden_files_and_archive_leftovers_are_skipped(tmp_path):
    extra = {"__MACOSX/._a.png": b"x", ".cache/b.png": b"x", "._c.png": b"x"}
    assert_is_patches(load("edm_zip", write_zip(tmp_path / "set.zip", PNGS | extra)))


def test_link_that_leads_back_is_not_followed_for_ever(tmp_path):
    folder = write_folder(tmp_path / "set", PNGS)
    (folder / "00000" / "loop").symlink_to(folder, target_is_directory=True)
    assert_is_patches(load("folder", folder, labels=False))


def test_linked_class_folders_are_read(tmp_path):
    real = write_folder(tmp_path / "real", {"0.png": PNGS[NAMES[0]]})
    shutil.copytree(real, tmp_path / "set" / "a")
    (tmp_path / "set" / "b").symlink_to(real, target_is_directory=True)
    assert load("folder", tmp_path / "set").labels.tolist() == [0, 1]
