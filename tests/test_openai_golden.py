"""OpenAI's U-Net and the scalings around it against numbers of the official consistency models (arXiv 2303.01469)."""

import pytest
import torch
from golden_cases import load_case
from golden_models import openai_model_of

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM, EDMBoundary
from fastcm.io.openai_layout import to_openai
from fastcm.nn import FAMILIES
from fastcm.nn.embeddings import PositionalEmbedding

SCALINGS = {"edm": EDM(), "boundary": EDMBoundary(sigma_min=0.002)}


@pytest.fixture(params=["E_unet_uncond", "E_unet_cond"])
def name(request):
    return request.param


def close_in_scale(actual, expected, tolerance=2e-5):
    """Gradients are sums over many pixels, so rounding goes with the largest element, not with each one.

    Where all of a gradient is rounding (an addend before a norm of single channels cancels) both sides are near 0.
    """
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=max(tolerance * expected.abs().max().item(), 5e-6))


def raw(case, model, x):
    """The network at the case's official time steps, which are 1000 c_noise."""
    c_noise = case.tensors["in/timesteps_raw"] / 1000
    assert torch.equal(c_noise * model.net.family.noise_scale, case.tensors["in/timesteps_raw"])
    return model.from_input(x, c_noise, case.tensors.get("in/y"))


def test_outputs_are_the_official_ones(name):
    case = load_case(name)
    model = openai_model_of(name, EDM())
    case.close(raw(case, model, case.tensors["in/x_raw"]), "out/raw")
    x, t, y = case.tensors["in/x"], case.tensors["in/t"], case.tensors.get("in/y")
    case.close(model.raw(x, t, y), "out/model_output")


@pytest.mark.parametrize("scalings", SCALINGS)
def test_denoiser_is_the_official_one_under_both_scalings(name, scalings):
    case = load_case(name)
    model = openai_model_of(name, SCALINGS[scalings])
    case.close(model(case.tensors["in/x"], case.tensors["in/t"], case.tensors.get("in/y")), f"out/denoised_{scalings}")


def test_gradients_are_the_official_ones(name):
    case = load_case(name)
    model = openai_model_of(name, EDM())
    x = case.tensors["in/x_raw"].clone().requires_grad_()
    loss = (raw(case, model, x) * case.tensors["in/loss_weight"]).double().sum()
    loss.backward()
    torch.testing.assert_close(loss, case.tensors["out/loss"], rtol=1e-4, atol=1e-3)
    close_in_scale(x.grad, case.tensors["grad/x_raw"])

    gradients = to_openai({name: weight.grad for name, weight in model.net.named_parameters()}, model.net)
    for key in case.tensors:
        if key.startswith("grad/") and key != "grad/x_raw":
            close_in_scale(gradients[key.removeprefix("grad/")], case.tensors[key])
    names = case.name_lists["out/grad_norms"]
    assert sorted(names) == sorted(gradients)
    norms = torch.stack([gradients[key].double().norm() for key in names])
    close_in_scale(norms, case.tensors["out/grad_norms"], tolerance=1e-7)


@pytest.mark.parametrize("scalings", SCALINGS)
def test_tables_of_scalings_are_the_official_ones(scalings):
    case = load_case("E_tables")
    c_skip, c_out, c_in, c_noise = SCALINGS[scalings].scalings(case.tensors["in/sigma"])
    case.close(torch.stack((c_skip, c_out, c_in)), f"out/{scalings}_scalings")
    case.close(c_noise * FAMILIES["openai"].noise_scale, "out/rescaled_t")


@pytest.mark.parametrize("num", [2, 10, 18, 40])
def test_noise_levels_are_the_official_ones(num):
    case = load_case("E_tables")
    case.close(karras_sigmas(num), f"out/sigmas_karras_{num}")


def test_time_embedding_is_the_official_one_at_large_times():
    """250 ln(0.002) is -1554: frequencies that are one bit off show in the fifth digit of the sines."""
    case, family = load_case("E_tables"), FAMILIES["openai"]
    t = torch.tensor([0, 1.5, -1553.65, 1095.5])
    embedding = PositionalEmbedding(32, family.endpoint, family.sin_first, family.frequencies)
    case.close(embedding(t), "out/timestep_embedding_32")
    with pytest.raises(AssertionError):
        case.close(PositionalEmbedding(32, family.endpoint, family.sin_first)(t), "out/timestep_embedding_32")
