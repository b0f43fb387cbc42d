"""Philox4x32-10 against the published vectors, and the streams built on it against statistics."""

import math

import pytest
import torch

from fastcm.kernels.philox import philox4x32
from fastcm.random import MAX_SEED, Stream

ONES = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
STREAM = Stream(1, "test")


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_bits_are_the_documented_counter_layout():
    stream, index, draw = Stream(7, "noise"), 2**33 + 5, 3
    bits = stream.bits(torch.tensor([index]), (9,), draw)[0]
    block = philox4x32(tuple(torch.tensor([word]) for word in (2, draw, index % 2**32, index // 2**32)), stream.key)
    assert bits[8] == block[0]


def test_numbers_do_not_depend_on_the_batch_they_are_drawn_in():
    together = STREAM.normal(torch.arange(64), (5,))
    alone = torch.cat([STREAM.normal(torch.tensor([i]), (5,)) for i in range(64)])
    assert torch.equal(together, alone)


def test_numbers_do_not_depend_on_how_many_are_drawn():
    assert torch.equal(STREAM.normal(torch.arange(4), (11,))[:, :6], STREAM.normal(torch.arange(4), (6,)))


@pytest.mark.parametrize("other", [Stream(2, "test"), Stream(1, "other")])
def test_seed_and_purpose_select_another_sequence(other):
    index = torch.arange(100)
    assert not torch.equal(STREAM.bits(index), other.bits(index))


def test_draw_number_selects_another_sequence():
    index = torch.arange(100)
    assert not torch.equal(STREAM.bits(index, (), 0), STREAM.bits(index, (), 1))


def test_uniform_is_flat_and_stays_below_one():
    values = STREAM.uniform(torch.arange(100_000))
    counts = torch.histc(values, 100, 0, 1)
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert values.min() >= 0
    assert values.max() < 1
    assert chi_squared < 149  # the 99.9 % quantile for 99 degrees of freedom


def test_normal_has_gaussian_moments_and_tails():
    values = STREAM.normal(torch.arange(50_000), (4,)).flatten().double()
    n = len(values)
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)
    distances = 0.5 * (1 + torch.erf(values.sort().values / 2**0.5))
    steps = torch.arange(n) / n
    assert (distances - steps).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, 0.1 %


def test_neighbouring_elements_samples_and_draws_are_uncorrelated():
    values = torch.stack([STREAM.normal(torch.arange(20_000), (2,), draw) for draw in range(2)])
    first = values[0, :, 0]
    others = (values[0, :, 1], values[1, :, 0], first.roll(1))
    assert all(abs(float((first * other).mean())) < 4 / math.sqrt(20_000) for other in others)


def test_bernoulli_has_its_probability():
    kept = STREAM.bernoulli(torch.arange(100_000), 0.13).float().mean()
    assert abs(float(kept) - 0.13) < 4 * math.sqrt(0.13 * 0.87 / 100_000)


@pytest.mark.parametrize(("p", "expected"), [(0.0, False), (1.0, True)])
def test_bernoulli_is_exact_at_its_ends(p, expected):
    assert bool((STREAM.bernoulli(torch.arange(1000), p) == expected).all())


def test_integers_cover_their_range_evenly():
    counts = torch.bincount(STREAM.integers(torch.arange(70_000), 7), minlength=7)
    assert len(counts) == 7
    assert float(((counts - 10_000.0) ** 2 / 10_000).sum()) < 22.5  # 99.9 % quantile, 6 degrees of freedom


def test_image_noise_is_channels_last_and_counts_channels_first():
    index = torch.arange(2)
    images = STREAM.image_normal(index, (3, 4, 5))
    assert images.shape == (2, 3, 4, 5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.permute(0, 2, 3, 1).reshape(2, -1), STREAM.normal(index, (60,)))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_outside_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match="outside"):
        Stream(seed, "x")


@pytest.mark.parametrize("high", [0, 2**31 + 1])
def test_integer_range_that_cannot_be_drawn_is_refused(high):
    with pytest.raises(ValueError, match="high"):
        STREAM.integers(torch.arange(2), high)
