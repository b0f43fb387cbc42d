"""Whole networks and steps on the Triton kernels, through the door that users take, against the reference backend."""

from dataclasses import replace

import pytest
import torch
from golden_models import batch_of

from fastcm import ops
from fastcm.diffusion.preconditioners import EDM
from fastcm.model import Model
from fastcm.nn.unet import UNet
from fastcm.objectives import ECT, EDMObjective, Networks
from fastcm.random import Stream

SHAPE = (3, 8, 8)
SIZES = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.25}


def model_of(family):
    net = UNet(family, 8, 3, label_dim=4, augment_dim=9, **SIZES).init_weights(0)
    with torch.no_grad():  # the last layers begin as zeros, which would hide what is before them
        for number, parameter in enumerate(net.parameters()):
            noise = Stream(1, f"perturbation {number}").normal(torch.zeros(1, dtype=torch.int64), tuple(parameter.shape))[0]
            parameter += 0.05 * noise
    return Model(net, EDM(), SHAPE, label_dim=4)


def batch(num=3):
    index = torch.arange(num)
    images = Stream(0, "images").image_normal(index, SHAPE).clamp(-2, 2) / 2
    return replace(batch_of(images, torch.eye(4)[:num]), augment=torch.eye(9)[:num])


def step(family, objective, backend):
    """(loss of each image, gradient of each parameter)."""
    model, schedule = model_of(family), {}
    if isinstance(objective, ECT):
        schedule = {"decay": torch.tensor(0.5)}
    with ops.use_backend(backend, strict=backend == "triton"):
        loss = objective.loss(Networks(model), batch(), 0, schedule).loss_N
        loss.mean().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["ddpmpp", "adm"])
@pytest.mark.parametrize("objective", [EDMObjective(), ECT()], ids=["edm", "ect"])
def test_step_on_the_kernels_is_that_of_the_reference(family, objective):
    expected, expected_gradients = step(family, objective, "torch")
    loss, gradients = step(family, objective, "triton")
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=2e-5 * scale + 1e-7, msg=name)
