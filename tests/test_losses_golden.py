"""EDM, VP and VE losses, and their gradients, against the official ones."""

import pytest
import torch
from golden_cases import load_case
from golden_models import assert_gradients_match, batch_of, model_of

from fastcm.objectives import EDMObjective
from fastcm.objectives.edm import weighted_error

WEIGHTS = {"edm": "A_tiny", "vp": "A_VPPrecond", "ve": "A_VEPrecond"}
CASES = {variant: f"B_{variant.upper()}Loss" for variant in WEIGHTS}


def objective_of(variant, **changes):
    config = load_case(CASES[variant]).config
    constants = {name.lower(): float(value) for name, value in config.items()}
    return EDMObjective(variant=variant, **(constants | changes))


def evaluate(variant, objective):
    """(sigma, weight, denoised images, loss per image, model) with the draws of the golden case."""
    case = load_case(CASES[variant])
    model = model_of(WEIGHTS[variant], objective.precond)
    batch = batch_of(case.tensors["in/images"], case.tensors.get("in/labels"))
    sigma = objective.noise.sigma(case.tensors["in/rnd"].flatten())
    noise = case.tensors["in/noise_unit"]
    terms = objective.loss_at(model, batch, sigma, noise)
    with torch.no_grad():
        denoised = model(batch.images + sigma[:, None, None, None] * noise, sigma, batch.labels)
    return sigma, objective.noise.weight(sigma), denoised, terms.loss_N, model


@pytest.mark.parametrize("variant", CASES)
def test_loss_and_gradients_are_the_official_ones(variant):
    case = load_case(CASES[variant])
    sigma, weight, denoised, loss, model = evaluate(variant, objective_of(variant))
    case.close(sigma[:, None, None, None], "mid/sigma")
    case.close(weight[:, None, None, None], "mid/weight")
    per_element = weighted_error(denoised, case.tensors["in/images"], weight)
    case.close(per_element, "out/loss")
    torch.testing.assert_close(loss, per_element.flatten(1).sum(1), rtol=1e-5, atol=1e-5)
    case.close(loss.mean(), "out/loss_sum_over_batch")
    loss.mean().backward()
    assert_gradients_match(case, model)


PERTURBED = [
    ("edm", {"p_mean": -1.19}),
    ("edm", {"p_std": 1.21}),
    ("edm", {"sigma_data": 0.505}),
    ("vp", {"beta_d": 20.0}),
    ("vp", {"beta_min": 0.11}),
    ("vp", {"epsilon_t": 1e-3}),
    ("ve", {"sigma_min": 0.0202}),
    ("ve", {"sigma_max": 101.0}),
]


@pytest.mark.parametrize(("variant", "change"), PERTURBED)
def test_a_wrong_constant_is_noticed(variant, change):
    case = load_case(CASES[variant])
    _, weight, denoised, _, _ = evaluate(variant, objective_of(variant, **change))
    with pytest.raises(AssertionError):
        case.close(weighted_error(denoised, case.tensors["in/images"], weight), "out/loss")


@pytest.mark.parametrize("variant", ["vp", "ve"])
def test_a_wrong_preconditioner_is_noticed(variant):
    objective = objective_of(variant)
    case = load_case(CASES[variant])
    sigma = case.tensors["mid/sigma"].flatten()
    x = case.tensors["in/images"] + case.tensors["mid/sigma"] * case.tensors["in/noise_unit"]
    denoised = model_of(WEIGHTS[variant], EDMObjective().precond)(x, sigma)
    with pytest.raises(AssertionError):
        case.close(weighted_error(denoised, case.tensors["in/images"], objective.noise.weight(sigma)), "out/loss")
