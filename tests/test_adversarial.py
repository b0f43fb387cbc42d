"""Differentiable augmentation, the losses of the adversarial stage and their balance."""

import math

import pytest
import torch
from golden_cases import case_names, load_case

from fastcm.diffusion.adversarial import adaptive_weight, discriminator_hinge, generator_hinge
from fastcm.nn.diff_augment import DiffAugment, Draws
from fastcm.random import Stream


def images(*shape: int, draw: int = 0) -> torch.Tensor:
    return Stream(7, "test").uniform(torch.arange(shape[0]), shape[1:], draw) * 2 - 1


# Differentiable augmentation.


def middle(num: int) -> Draws:
    """Draws that change nothing, but for the place of the cutout: the first pixels."""
    half = torch.full((num,), 0.5)
    return Draws(half, half, half, torch.full((num, 2), 0.5), torch.zeros(num, 2))


def test_middle_draws_without_cutout_change_nothing():
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(DiffAugment(cutout=0)(x, middle(2)), x)


def test_colours_follow_their_formulas():
    x, u = images(2, 3, 8, 8), torch.tensor([0.0, 0.75])
    augment = DiffAugment(translation=0, cutout=0)
    brighter = augment(x, middle(2)._replace(brightness_N=u)) - x
    torch.testing.assert_close(brighter[:, 0, 0, 0], torch.tensor([-0.5, 0.25]))
    gray = x.mean(1, keepdim=True)
    torch.testing.assert_close(augment(x, middle(2)._replace(saturation_N=u))[0], gray[0].expand(3, -1, -1))
    torch.testing.assert_close(augment(x, middle(2)._replace(saturation_N=u))[1], gray[1] + 1.5 * (x - gray)[1])
    mean = x.mean((1, 2, 3), keepdim=True)
    expected = mean + (x - mean) * torch.tensor([0.5, 1.25])[:, None, None, None]
    torch.testing.assert_close(augment(x, middle(2)._replace(contrast_N=u)), expected)


def test_images_move_by_whole_pixels_up_to_an_eighth_and_zeros_come_in():
    x, augment = images(1, 1, 16, 16) + 2, DiffAugment(cutout=0)
    seen = set()
    for row in range(10):
        shift = torch.tensor([[row / 10, 0.999]])
        moved = augment(x, middle(1)._replace(shift_N2=shift))[0, 0]
        down = math.floor(row / 10 * 5) - 2
        seen.add(down)
        wanted = torch.zeros(16, 16)
        wanted[max(down, 0) : 16 + min(down, 0), 2:] = x[0, 0, max(-down, 0) : 16 - max(down, 0), :14]
        torch.testing.assert_close(moved, wanted)
    assert seen == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(("size", "side"), [(8, 2), (16, 3), (32, 6)])
def test_a_fifth_of_each_side_is_cut_out_and_the_border_cuts_the_square(size, side):
    index = torch.arange(4000)
    augment = DiffAugment(brightness=0, saturation=0, contrast=0, translation=0)
    zeros = augment(torch.ones(4000, 1, size, size), augment.draw(index, 0))[:, 0] == 0
    rows, columns = zeros.any(2).sum(1), zeros.any(1).sum(1)
    assert torch.equal(zeros.sum((1, 2)), rows * columns)
    low = side // 2 if side % 2 == 0 else side // 2 + 1
    assert {rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()} == {low, side}
    assert zeros.any(0).all()


def test_draws_are_uniform_and_independent():
    draws = DiffAugment().draw(torch.arange(20000), 0)
    table = torch.cat([value.reshape(20000, -1) for value in draws], 1)
    assert table.shape == (20000, 7)
    torch.testing.assert_close(table.mean(0), torch.full((7,), 0.5), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.corrcoef(table.T), torch.eye(7), rtol=0, atol=0.03)


def test_a_split_batch_is_augmented_alike():
    x, index, augment = images(6, 3, 32, 32), torch.arange(100, 106), DiffAugment()
    whole = augment(x, augment.draw(index, 5))
    parts = [augment(x[part], augment.draw(index[part], 5)) for part in (slice(0, 1), slice(1, 6))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(augment(x, augment.draw(index, 5, 1)), whole)
    assert not torch.equal(augment(x, augment.draw(index, 6)), whole)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_has_the_right_gradient(channels):
    x, augment = images(2, channels, 8, 8).double().requires_grad_(True), DiffAugment()
    draws = augment.draw(torch.tensor([3, 9]), 0)
    assert torch.autograd.gradcheck(lambda given: augment(given, draws), x)


def test_augmentation_keeps_the_dtype():
    x, augment = images(2, 3, 8, 8), DiffAugment()
    draws = augment.draw(torch.arange(2), 0)
    half = augment(x.bfloat16(), draws)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), augment(x, draws), rtol=0.02, atol=0.03)


# Losses.


def test_hinge_losses_per_image():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    torch.testing.assert_close(discriminator_hinge(real, fake), torch.tensor([0.25 + 0.5, 1.0 + 1.25]))
    torch.testing.assert_close(generator_hinge(fake), torch.tensor([1.5, -0.25]))


@pytest.mark.parametrize("name", [name for name in case_names("F_") if name.endswith("adaptive_weight")])
def test_adaptive_weight_is_the_official_one(name):
    case = load_case(name)
    reference, other, weight, adversarial = case.tensors["out/table"].unbind(1)
    tolerance = {"rtol": case.tolerance["rtol"], "atol": case.tolerance["atol"]}
    torch.testing.assert_close(adaptive_weight(reference, other), weight, **tolerance)
    torch.testing.assert_close(adaptive_weight(reference, other, 0.01, 10), adversarial, **tolerance)


def test_both_official_adaptive_weights_are_tested():
    assert [name for name in case_names("F_") if name.endswith("weight")] == ["F_kim_adaptive_weight", "F_sony_adaptive_weight"]


def test_adaptive_weight_balances_the_gradients_of_the_last_layer():
    layer = images(4, 3).requires_grad_(True)
    losses = (layer * 3).sum(), layer.square().sum()
    gradients = [torch.autograd.grad(loss, layer, create_graph=True)[0] for loss in losses]
    weight = adaptive_weight(*(gradient.norm() for gradient in gradients))
    assert not weight.requires_grad
    torch.testing.assert_close((weight * gradients[1]).norm(), gradients[0].norm(), rtol=1e-3, atol=0)
