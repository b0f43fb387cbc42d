"""Batches: pure functions of the sample number, the same for any world size."""

import pytest
import torch
from sklearn.datasets import load_sample_image

from fastcm.data import Batch, Loader, ResidentDataset, load_resident, open_source
from fastcm.data.augment import AugmentPipe
from fastcm.errors import ConfigError


@pytest.fixture(scope="module")
def digits() -> ResidentDataset:
    return load_resident(open_source("digits"))


@pytest.fixture(scope="module")
def patches() -> ResidentDataset:
    china = torch.from_numpy(load_sample_image("china.jpg").copy())
    images = china[:416].reshape(13, 32, 20, 32, 3).transpose(1, 2).reshape(260, 32, 32, 3).contiguous()
    return ResidentDataset(images, None, 0, "china", "china.jpg")


def same(a: Batch, b: Batch) -> bool:
    pairs = ((a.images, b.images), (a.labels, b.labels), (a.augment, b.augment), (a.index, b.index))
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_batch_is_what_the_network_expects(digits):
    batch = Loader(digits, 16, seed=0).batch(1790)
    assert batch.images.shape == (16, 1, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.min() == -1
    assert batch.images.max() == 1
    assert torch.equal(batch.labels.sum(1), torch.ones(16))
    assert batch.labels.shape == (16, 10)
    assert batch.augment is None
    assert torch.equal(batch.index, torch.arange(1790, 1806))
    assert len(batch) == 16


def test_pixels_and_labels_belong_to_the_ordered_images(digits):
    loader = Loader(digits, 32, seed=4)
    batch = loader.batch(64)
    ids = loader._order.ids(batch.index)
    assert torch.equal(((batch.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1), digits.images[ids])
    assert torch.equal(batch.labels.argmax(1), digits.labels[ids])


def test_every_image_of_the_set_comes_once_per_epoch(digits):
    loader = Loader(digits, 599, seed=0)
    labels = torch.cat([loader.batch(599 * i).labels for i in range(3)])
    assert torch.equal(labels.sum(0), torch.nn.functional.one_hot(digits.labels).sum(0).float())


def test_batch_is_a_pure_function_of_its_first_index(patches):
    def make() -> Loader:
        return Loader(patches, 8, seed=0, xflip=True, augment=AugmentPipe.edm_cifar10())

    loader = make()
    first = loader.batch(800)
    loader.batch(8)
    assert same(loader.batch(800), first)
    assert same(make().batch(800), first)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_union_over_ranks_is_the_single_rank_batch(patches, world_size):
    def make(**place: int) -> Loader:
        return Loader(patches, 16, seed=5, xflip=True, augment=AugmentPipe.edm_cifar10(p=0.5), **place)

    whole = make().batch(256)
    parts = [make(rank=rank, world_size=world_size).batch(256) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    assert torch.equal(torch.cat([part.augment for part in parts]), whole.augment)
    torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, rtol=0, atol=1e-5)


def test_xflip_mirrors_about_half_of_the_images_and_nothing_else(patches):
    plain, flipped = (Loader(patches, 260, seed=2, xflip=xflip).batch(0).images for xflip in (False, True))
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    assert 90 < mirrored.sum() < 170
    assert torch.equal(flipped[mirrored], plain.flip(3)[mirrored])


def test_augment_labels_arrive_and_have_the_announced_width(patches):
    loader = Loader(patches, 4, seed=0, augment=AugmentPipe.edm_cifar10())
    batch = loader.batch(0)
    assert batch.augment.shape == (4, loader.augment_dim) == (4, 9)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert Loader(patches, 4, seed=0).augment_dim == 0


def test_seed_changes_the_batch(digits):
    assert not same(Loader(digits, 16, seed=0).batch(0), Loader(digits, 16, seed=1).batch(0))


def test_batch_that_cannot_be_split_is_refused(digits):
    with pytest.raises(ConfigError, match=r"batch_size 10 .* 4 ranks"):
        Loader(digits, 10, seed=0, world_size=4)
    with pytest.raises(ConfigError, match="rank 2"):
        Loader(digits, 4, seed=0, rank=2, world_size=2)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", ["cpu", "cuda"])
def test_gpu_batches_equal_cpu_batches_and_never_wait(patches, resident):
    moved = ResidentDataset(patches.images.to(resident), None, 0, "china", "china.jpg")
    loader = Loader(moved, 32, seed=0, device="cuda", xflip=True, augment=AugmentPipe.edm_cifar10(p=0.5))
    loader.batch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = loader.batch(32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Loader(patches, 32, seed=0, xflip=True, augment=AugmentPipe.edm_cifar10(p=0.5)).batch(32)
    torch.testing.assert_close(batch.images.cpu(), expected.images, rtol=0, atol=1e-3)
    torch.testing.assert_close(batch.augment.cpu(), expected.augment)
