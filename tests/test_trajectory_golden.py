"""CTM's samplers against the official ones, under the noise that those drew."""

import math

import pytest
import torch
from golden_cases import load_case
from golden_models import kim_model_of, openai_model_of

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM
from fastcm.sampling import sample_consistency, sample_heun, sample_trajectory

MODELS = {"kim": kim_model_of, "sony": openai_model_of}
LAST = {"kim": 17, "sony": 39}  # the end of the two-jump sampler's grid, whatever its number of steps


@pytest.fixture(params=MODELS)
def net(request):
    return request.param


def grid(steps):
    """Karras' levels for ``steps`` jumps: the last one is sigma_min."""
    return karras_sigmas(steps + 1)[:-1]


def setup(name):
    """(case, model, start, what every sampler is given)."""
    net, case = name.split("_")[1], load_case(name)
    noises = case.tensors.get("in/noises")
    extra = {"labels": case.tensors.get("in/y"), "noise": lambda jump: noises[jump - 1]}
    return case, MODELS[net](f"F_{net}_net", EDM()), case.tensors["in/x_T_unit"].double() * 80.0, extra


def check(name, sigmas, **options):
    case, model, x, extra = setup(name)
    case.close(sample_trajectory(model, x, sigmas, **extra, **options), "out/x")


def differs(name, sigmas, **options):
    with pytest.raises(AssertionError):
        check(name, sigmas, **options)


@pytest.mark.parametrize("steps", [1, 5])
def test_deterministic_jumps_are_the_official_ones(net, steps):
    name = f"F_{net}_sample_exact_{steps}"
    check(name, grid(steps))
    differs(name, karras_sigmas(steps))  # ends at 0


def test_deterministic_jumps_on_a_grid_of_the_users_are_the_official_ones(net):
    name = f"F_{net}_sample_exact_ts"
    config = load_case(name).config
    check(name, karras_sigmas(config["steps"])[config["ts"]])


def test_gamma_sampling_is_the_official_one(net):
    name = f"F_{net}_sample_gamma_multistep"
    config = load_case(name).config
    check(name, grid(config["steps"]), gamma=config["gamma"])
    differs(name, grid(config["steps"]), gamma=config["gamma"], sigma_min=0.0)
    differs(name, grid(config["steps"]), gamma=config["gamma"] + 0.01)


def test_gamma_sampling_on_a_grid_of_the_users_is_the_official_one(net):
    name = f"F_{net}_sample_gamma_multistep_ts"
    config = load_case(name).config
    check(name, karras_sigmas(config["steps"])[config["ts"]], gamma=config["gamma"])


def test_gamma_one_is_the_official_consistency_sampler(net):
    name = f"F_{net}_sample_cm_multistep"
    check(name, grid(load_case(name).config["steps"]), gamma=1.0)
    differs(name, grid(load_case(name).config["steps"]), gamma=1.0, sigma_min=0.0)


def test_consistency_sampler_takes_the_jump_to_sigma_min_as_its_denoiser(net):
    name = f"F_{net}_sample_cm_multistep"
    case, model, x, extra = setup(name)
    levels = torch.cat((grid(case.config["steps"])[:-1], torch.zeros(1, dtype=torch.float64)))
    x = sample_consistency(lambda x, t, **labels: model.jump(x, t, 0.002, **labels), x, levels, **extra, sigma_min=0.002)
    case.close(x, "out/x")


def test_two_jumps_with_noise_between_are_the_official_ones(net):
    """The official arguments are the level that the first jump ends at and the one that noise leads back to."""
    name = f"F_{net}_sample_gamma_2step"
    config = load_case(name).config
    levels = karras_sigmas(config["steps"])
    low, high = levels[config["ind_1"]].item(), levels[config["ind_2"]].item()
    gamma = math.sqrt(1 - ((low - 0.002) / (high - 0.002)) ** 2)
    check(name, levels[[0, config["ind_2"], LAST[net]]], gamma=gamma)


def test_heun_on_the_learned_score_is_the_official_one(net):
    name = f"F_{net}_sample_heun_ctm"
    case, model, x, extra = setup(name)
    case.close(sample_heun(model, x, karras_sigmas(case.config["steps"]), labels=extra["labels"]), "out/x")
