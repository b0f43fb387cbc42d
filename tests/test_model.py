"""The denoiser around a network: calling forms, precisions and messages."""

import pytest
import torch
from torch import nn

from fastcm.diffusion.preconditioners import EDM
from fastcm.model import Model, one_hot
from fastcm.random import Stream

SHAPE = (3, 4, 6)


class Echo(nn.Module):
    """A network of more output channels than the image has, which records what it is given."""

    def forward(self, x, c_noise, labels=None, augment=None, dropout=None):
        self.given = {"x": x, "c_noise": c_noise, "labels": labels, "augment": augment}
        return torch.cat((x, 7 * x), dim=1)


@pytest.fixture
def model():
    return Model(Echo(), EDM(), SHAPE, label_dim=5)


@pytest.fixture
def x():
    return Stream(0, "x").image_normal(torch.arange(2), SHAPE)


def test_denoised_is_the_preconditioned_network(model, x):
    sigma = torch.tensor([0.5, 2.0])
    c_skip, c_out, c_in, c_noise = EDM().scalings(sigma)
    expected = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * c_in[:, None, None, None] * x
    torch.testing.assert_close(model(x, sigma), expected)
    assert torch.equal(model.net.given["c_noise"], c_noise)


def test_sigma_may_be_a_number_a_scalar_or_one_per_image(model, x):
    expected = model(x, torch.tensor([2.0, 2.0]))
    for sigma in (2.0, 2, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.float64)):
        assert torch.equal(model(x, sigma), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_is_single_precision_for_images_of_any_precision(model, x, dtype):
    denoised = model(x.to(dtype), 1.0)
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, model(x.to(dtype).float(), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_gets_its_dtype_in_channels_last(x, dtype):
    model = Model(Echo(), EDM(), SHAPE, dtype=dtype)
    F_x = model.raw(x.contiguous(), torch.ones(2))
    assert model.net.given["x"].dtype == dtype
    assert model.net.given["x"].is_contiguous(memory_format=torch.channels_last)
    assert model.net.given["c_noise"].dtype == torch.float32
    assert F_x.dtype == torch.float32
    assert F_x.shape == x.shape


def test_class_ids_and_one_hot_rows_are_the_same(model, x):
    model(x, 1.0, torch.tensor([4, 0]))
    rows = model.net.given["labels"]
    assert torch.equal(rows, torch.eye(5)[[4, 0]])
    model(x, 1.0, rows)
    assert torch.equal(model.net.given["labels"], rows)
    model(x, 1.0)
    assert model.net.given["labels"] is None
    assert torch.equal(one_hot(torch.tensor([5, -1]), 5), torch.zeros(2, 5))


def test_other_scalings_replace_the_models_own(model, x):
    sigma = torch.tensor([0.5, 2.0])
    scalings = EDM(1.0).scalings(sigma)
    torch.testing.assert_close(model.raw(x, sigma, scalings=scalings), scalings.c_in[:, None, None, None] * x)


def test_augmentation_labels_reach_the_network(model, x):
    augment = torch.ones(2, 9)
    model(x, 1.0, augment=augment)
    assert model.net.given["augment"] is augment


def test_range_and_rounding_are_those_of_the_preconditioner(model):
    assert (model.sigma_min, model.sigma_max) == (0.0, float("inf"))
    sigma = torch.tensor([3.0])
    assert torch.equal(model.round_sigma(sigma), sigma)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4, 4), 1.0), r"\[N, 3, 4, 6\], got \[2, 3, 4, 4\]"),
        ((torch.zeros(3, 4, 6), 1.0), r"got \[3, 4, 6\]"),
        ((torch.zeros(2, *SHAPE, dtype=torch.uint8), 1.0), "uint8"),
        ((torch.zeros(2, *SHAPE), torch.ones(3)), r"or \[2\], got shape \[3\]"),
        ((torch.zeros(2, *SHAPE), torch.ones(2, 1, 1, 1)), r"got shape \[2, 1, 1, 1\]"),
        ((torch.zeros(2, *SHAPE), 1.0, torch.tensor([1, 2, 3])), r"class ids \[2\].*int64 \[3\]"),
        ((torch.zeros(2, *SHAPE), 1.0, torch.zeros(2, 4)), r"one-hot rows \[2, 5\].*float32 \[2, 4\]"),
        ((torch.zeros(2, *SHAPE), 1.0, torch.zeros(2)), r"one-hot rows \[2, 5\]"),
    ],
)
def test_wrong_arguments_say_why(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_labels_for_a_model_without_classes_say_why(x):
    with pytest.raises(ValueError, match="no classes"):
        Model(Echo(), EDM(), SHAPE)(x, 1.0, torch.tensor([0, 1]))
