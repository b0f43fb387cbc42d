"""Properties of the augmentation pipe that hold for any draws."""

import math

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from fastcm.data.augment import DRAWS, AugmentPipe
from fastcm.data.warp import inverse_affine, warp
from fastcm.errors import ConfigError

CHINA = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float() / 127.5 - 1
IMAGES = torch.stack([CHINA[:, 32 * i : 32 * i + 32, 40 * i : 40 * i + 32] for i in range(12)])
DIGITS = torch.from_numpy(load_digits().images[:12, None]).float() / 8 - 1
INDEX = torch.arange(12)
EVERYTHING = AugmentPipe(**dict.fromkeys(DRAWS, 1.0))


def affine(count, *, scale=0.0, rotation=0.0, stretch=0.0, angle=0.0, shift=(0.0, 0.0)):
    numbers = [torch.full((count,), float(value)) for value in (scale, rotation, stretch, angle)]
    return inverse_affine(*numbers, torch.tensor(shift).expand(count, 2))


def test_warping_by_nothing_gives_the_image_back():
    torch.testing.assert_close(warp(IMAGES, affine(12)), IMAGES, rtol=0, atol=1e-5)
    torch.testing.assert_close(warp(DIGITS, affine(12)), DIGITS, rtol=0, atol=1e-5)


def test_warping_by_a_whole_pixel_moves_the_image_right_and_down():
    moved = warp(IMAGES, affine(12, shift=(1.0, 2.0)))
    torch.testing.assert_close(moved[:, :, 2:, 1:], IMAGES[:, :, :-2, :-1], rtol=0, atol=1e-5)


def test_warping_by_half_a_turn_is_nearly_both_flips():
    # sym6 is not quite symmetric, so the turn is not exact.
    difference = warp(IMAGES, affine(12, rotation=math.pi)) - IMAGES.flip(2, 3)
    assert difference.abs().mean() < 0.05


def test_warp_handles_sides_that_differ():
    wide = CHINA[None, :, :16, :48]
    torch.testing.assert_close(warp(wide, affine(1)), wide, rtol=0, atol=1e-5)


def test_affine_map_is_the_inverse_of_shift_stretch_rotate_scale():
    def matrix(angle):
        return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)

    stretch = matrix(-0.4) @ torch.diag(torch.tensor([2**0.5, 2**-0.5], dtype=torch.float64)) @ matrix(0.4)
    forward = stretch @ matrix(-0.9) * 2**0.3
    numbers = [torch.tensor([value], dtype=torch.float64) for value in (0.3, 0.9, 0.5, 0.4)]
    found = inverse_affine(*numbers, torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    linear = torch.stack(found[:4]).reshape(2, 2)
    torch.testing.assert_close(linear @ forward, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(found[4:])[:, 0], -linear @ torch.tensor([1.0, -2.0], dtype=torch.float64))


def test_pipe_with_zero_probability_changes_nothing():
    pipe = AugmentPipe(p=0, **dict.fromkeys(DRAWS, 1.0))
    images, labels = pipe(IMAGES, INDEX, seed=0)
    torch.testing.assert_close(images, IMAGES, rtol=0, atol=1e-5)
    assert not labels.any()


def test_pipe_without_transforms_has_no_labels():
    images, labels = AugmentPipe()(IMAGES, INDEX, seed=0)
    assert torch.equal(images, IMAGES)
    assert labels.shape == (12, 0)


def test_label_is_zero_exactly_for_untouched_images():
    pipe = AugmentPipe(p=0.3, yflip=1, rotate_int=1, translate_int=1, hue=1)
    images, labels = pipe(IMAGES, INDEX, seed=1)
    changed = (images - IMAGES).abs().amax((1, 2, 3)) > 1e-5
    assert torch.equal(changed, labels.any(1))
    assert 0 < changed.sum() < 12


@pytest.mark.parametrize("images", [IMAGES, DIGITS], ids=["colour", "grey"])
def test_image_does_not_depend_on_its_neighbours(images):
    together = EVERYTHING(images, INDEX, seed=3)
    for i in range(12):
        alone = EVERYTHING(images[i : i + 1], INDEX[i : i + 1], seed=3)
        torch.testing.assert_close(alone[0], together[0][i : i + 1], rtol=0, atol=1e-5)
        assert torch.equal(alone[1], together[1][i : i + 1])


def test_switching_one_transform_on_leaves_the_draws_of_the_others():
    few, many = AugmentPipe(scale=1, hue=1).draw(INDEX, 0), EVERYTHING.draw(INDEX, 0)
    assert all(torch.equal(many[name], value) for name, value in few.items())


def test_draws_are_spread_as_announced():
    index = torch.arange(20000)
    draws = EVERYTHING.draw(index, seed=7)
    for name, parts in DRAWS.items():
        for part, spec in parts.items():
            value = draws[f"{name}.{part}"]
            assert value.shape == ((20000,) if spec.size == 1 else (20000, spec.size))
            mean, variance = {
                "uniform": (0.5, 1 / 12),
                "normal": (0.0, 1.0),
                "integer": ((spec.high - 1) / 2, (spec.high**2 - 1) / 12),
            }[spec.kind]
            assert abs(value.mean() - mean) < 0.03
            assert abs(value.var() / variance - 1) < 0.05


def test_draws_do_not_repeat_each_other():
    draws = EVERYTHING.draw(torch.arange(4000), seed=7)
    columns = torch.cat([value.reshape(4000, -1) for value in draws.values()], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 0.08


def test_cifar_pipe_has_nine_labels_and_acts_with_its_probability():
    pipe = AugmentPipe.edm_cifar10()
    assert pipe.label_dim == 9
    chosen = pipe.parameters(pipe.draw(torch.arange(20000), seed=0))
    assert abs((chosen["xflip"] != 0).float().mean() - 0.5) < 0.02
    assert abs((chosen["yflip"] != 0).float().mean() - 0.06) < 0.01
    assert abs((chosen["scale"] != 0).float().mean() - 0.12) < 0.01


def test_grey_images_keep_their_hue():
    images, labels = AugmentPipe(hue=1, saturation=1)(DIGITS, INDEX, seed=0)
    assert torch.equal(images, DIGITS)
    assert labels.any()


def test_negative_strength_is_refused():
    with pytest.raises(ConfigError, match=r"augment.scale is -1, expected 0 or more"):
        AugmentPipe(scale=-1)
    with pytest.raises(ConfigError, match=r"augment.p is nan"):
        AugmentPipe(p=math.nan)
