"""The noise kernel in the interpreter against fp64: odd shapes, every memory an image can have, both sources of noise."""

import pytest
import torch

from fastcm.kernels.noise import add_noise
from fastcm.kernels.noise.reference import normal_images
from fastcm.random import Stream

INDEX = torch.tensor([3, 2**40 + 1, 2**32])
KEY = Stream(5, "noise").at(INDEX, draw=2)
T, R = torch.tensor([0.002, 1.7, 80.0]), torch.tensor([0.001, 1.2, 79.0])
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 1, 9), (1, 8, 8), (5, 3, 1), (3, 16, 31)]


def images(shape, purpose="clean"):
    return Stream(0, purpose).image_normal(INDEX, shape)


def memories(x):
    """The same images in every kind of memory."""
    n, c, h, w = x.shape
    wide, crop = x.new_full((n, 2 * c + 1, h, w), torch.nan), x.new_full((n, c, h + 2, w + 3), torch.nan)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 1 : c + 1], crop[:, :, 1 : h + 1, 2 : w + 2] = x, x
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "nchw", x.contiguous()
    yield "slice", wide[:, 1 : c + 1]
    yield "crop", crop[:, :, 1 : h + 1, 2 : w + 2]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)


def check(found, clean, noise, tolerance, dtype):
    """x against fp64 to rounding and to the noise's tolerance; the network input exactly, from the x that was found."""
    levels = {"t": (T, 1 / (T**2 + 0.25).sqrt()), "r": (R, 1 / (R**2 + 0.25).sqrt())}
    for name, (level, c_in) in levels.items():
        x, input = getattr(found, f"x_{name}"), getattr(found, f"input_{name}")
        exact = clean.double() + level.double()[:, None, None, None] * noise.double()
        bound = level[:, None, None, None] * tolerance + exact.abs() * 2e-7 + 1e-7
        assert x.dtype == torch.float32
        assert ((x - exact).abs() <= bound).all()
        # The interpreter cuts bf16 off instead of rounding it.
        off = {"rtol": 2.0**-7 if dtype == torch.bfloat16 else 0.0, "atol": 0.0}
        torch.testing.assert_close(input, (c_in[:, None, None, None] * x).to(dtype), **off)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert input.is_contiguous(memory_format=torch.channels_last)


def noised(clean, noise, dtype):
    scalings = (1 / (T**2 + 0.25).sqrt(), 1 / (R**2 + 0.25).sqrt())
    return add_noise(clean, noise, T, scalings[0], r_N=R, c_in_r_N=scalings[1], dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_drawn_noise_and_both_levels(shape, dtype):
    clean = images(shape)
    check(noised(clean, KEY, dtype), clean, normal_images(KEY, clean), 1e-6, dtype)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 6)])
def test_images_and_given_noise_in_any_memory(shape):
    clean, noise = images(shape), images(shape, "given")
    for name, readable in memories(clean):
        check(noised(readable, KEY, torch.float32), clean, normal_images(KEY, clean), 1e-6, torch.float32)
        for _, given in memories(noise):
            assert not given[:, :, :1, :1].isnan().any(), name
            check(noised(readable, given, torch.float16), clean, noise, 0.0, torch.float16)


def test_an_image_of_several_programs():
    clean = images((3, 24, 33))
    check(noised(clean, KEY, torch.float32), clean, normal_images(KEY, clean), 1e-6, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_low_precision_are_used_in_single_precision(dtype):
    clean = images((3, 5, 7)).to(dtype)
    check(noised(clean, KEY, torch.float32), clean, normal_images(KEY, clean), 1e-6, torch.float32)


def test_one_level_alone_and_expanded_arguments():
    clean, one = images((3, 5, 7)), torch.tensor(1.0)
    both = add_noise(clean[:1].expand(3, -1, -1, -1), KEY, one.expand(3), one.expand(3), r_N=R, c_in_r_N=R)
    alone = add_noise(clean[:1].expand(3, -1, -1, -1), KEY, one.expand(3), one.expand(3))
    assert alone.x_r is None
    assert alone.input_r is None
    assert torch.equal(alone.x_t, both.x_t)
    assert torch.equal(alone.input_t, alone.x_t)
    exact = clean[:1] + normal_images(KEY, clean)
    torch.testing.assert_close(alone.x_t, exact, rtol=0, atol=2e-6)


def test_strided_indices():
    clean = images((1, 4, 4))
    doubled = torch.stack([INDEX, INDEX + 1], dim=1)[:, 0]
    found = add_noise(clean, KEY._replace(index_N=doubled), T, T)
    assert torch.equal(found.x_t, add_noise(clean, KEY, T, T).x_t)


def test_no_images_at_all():
    none = add_noise(torch.empty(0, 3, 4, 5), KEY._replace(index_N=INDEX[:0]), T[:0], T[:0], dtype=torch.float16)
    assert none.x_t.shape == none.input_t.shape == (0, 3, 4, 5)
