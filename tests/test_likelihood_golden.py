"""CTM's likelihood against numbers of the official implementation (arXiv 2310.02279); its solver is adaptive RK45."""

import math

import pytest
import torch
from golden_cases import load_case
from golden_models import openai_model_of

from fastcm.diffusion.preconditioners import EDM
from fastcm.sampling.likelihood_ode import (
    follow_ode,
    official_residual_sigma,
    prior_log_density,
    residual_nats,
    slope_and_divergence,
)

SIGMA_MAX, RHO, FIRST_TIME = 80.0, 7, 1e-3
ROOTS = 0.002 ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
FIRST_SIGMA = (ROOTS[0] + FIRST_TIME * (ROOTS[1] - ROOTS[0])) ** RHO
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def case():
    return load_case("F_sony_likelihood")


@pytest.fixture(scope="module")
def model():
    return openai_model_of("F_sony_net", EDM())


def official(case, mode):
    """The inputs and results of one run of the official likelihood: "wrong" starts at the image, "correct" adds noise."""
    tensors = case.tensors
    probe = 2 * tensors[f"in/nll_{mode}_draw0_randint_like"] - 1
    noise = FIRST_SIGMA * tensors["in/nll_correct_draw1_randn_like"] if mode == "correct" else 0
    return tensors["in/images"] + noise, probe[None]


def test_drift_and_divergence_are_the_official_ones(case, model):
    tensors = case.tensors
    for row, (time, sigma) in enumerate(zip(tensors["in/pt_t"].double(), tensors["out/pt_sigma"].double(), strict=True)):
        x, probe = tensors["in/pt_x"][row : row + 1], tensors["in/pt_probe"][row : row + 1]
        slope, divergence = slope_and_divergence(model, x, sigma, probes_KNCHW=probe[None])
        # d ln(sigma) / d time of the official time, in which sigma^(1/7) is linear
        rate = RHO * (ROOTS[1] - ROOTS[0]) / (ROOTS[0] + time * (ROOTS[1] - ROOTS[0]))
        torch.testing.assert_close(rate * slope[0], tensors["out/pt_drift"][row], **TIGHT)
        torch.testing.assert_close(rate * divergence[0, 0], tensors["out/pt_div"][row].double(), **TIGHT)


def test_prior_is_the_official_one(case):
    prior = prior_log_density(case.tensors["in/prior_z"], SIGMA_MAX)
    torch.testing.assert_close(prior, case.tensors["out/prior_logp"].double(), **TIGHT)


def test_official_residual_is_taken_at_the_wrong_noise_level(case, model):
    images, noise = case.tensors["in/images"], case.tensors["in/residual_z"]
    sigma = official_residual_sigma(FIRST_SIGMA)
    assert sigma == pytest.approx(0.413, abs=1e-3)
    torch.testing.assert_close(residual_nats(model, images, noise, sigma), case.tensors["out/residual_nats"], **TIGHT)
    right = residual_nats(model, images, noise, FIRST_SIGMA)
    assert (right - case.tensors["out/residual_nats"]).abs().min() > 10


@pytest.mark.parametrize("mode", ["correct", "wrong"])
def test_the_whole_likelihood_is_the_official_one(case, model, mode):
    tensors = case.tensors
    x, probe = official(case, mode)
    path = follow_ode(model, x, FIRST_SIGMA, SIGMA_MAX, probes_KNCHW=probe)
    case.close(path.gain_KN[0], f"out/dlogp_{mode}")
    nats = -prior_log_density(path.end_NCHW, SIGMA_MAX) - path.gain_KN[0]
    if mode == "correct":
        noise = tensors["in/nll_correct_draw2_randn_like"]
        nats = nats + residual_nats(model, tensors["in/images"], noise, official_residual_sigma(FIRST_SIGMA))
    case.close(nats / (x[0].numel() * math.log(2)) + 7, f"out/nll_bpd_{mode}")
