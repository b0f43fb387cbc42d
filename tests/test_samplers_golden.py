"""EDM's samplers against the official ones: final images and the noise level of every network evaluation."""

import pytest
import torch
from golden_cases import case_names, load_case
from golden_models import model_of

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM, IDDPM, VE, VP
from fastcm.sampling import Ablation, sample_ablation, sample_heun

CHURN = {"s_churn": "S_churn", "s_tmin": "S_min", "s_tmax": "S_max", "s_noise": "S_noise"}
OPTIONS = (
    *("solver", "discretization", "schedule", "scaling", "sigma_min", "sigma_max"),
    *("rho", "epsilon_s", "C_1", "C_2", "M", "alpha"),
)


def network_of(name):
    for word, (weights, precond) in {
        "iddpm": ("A_iDDPMPrecond", IDDPM()),
        "_vp": ("A_VPPrecond", VP()),
        "_ve": ("A_VEPrecond", VE()),
    }.items():
        if word in name:
            return weights, precond
    return "A_tiny", EDM()


class Recorder:
    """A model that writes down the noise level of every call."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, sigma, **extra):
        self.calls.append(sigma[0].item())
        return self.model(x, sigma, **extra)

    def __getattr__(self, name):
        return getattr(self.model, name)


def run(name, **changes):
    """(images, noise levels of the evaluations) of a golden case with changed constants."""
    case = load_case(name)
    config = case.config | changes
    model = Recorder(model_of(*network_of(name)))
    noises = case.tensors.get("in/noises")
    extra = {ours: float(config[theirs]) for ours, theirs in CHURN.items()}
    extra |= {"labels": case.tensors.get("in/class_labels"), "noise": lambda step: noises[step]}
    if config["fn"] == "edm_sampler":
        low, high = max(config["sigma_min"], model.sigma_min), min(config["sigma_max"], model.sigma_max)
        sigmas = model.round_sigma(karras_sigmas(config["num_steps"], low, high, config["rho"]))
        x = sample_heun(model, case.tensors["in/latents"] * sigmas[0], sigmas, **extra)
    else:
        options = Ablation(**{option: config[option] for option in OPTIONS})
        sigmas = model.round_sigma(options.sigmas(config["num_steps"], model))
        x = sample_ablation(model, case.tensors["in/latents"] * sigmas[0], sigmas, options, **extra)
    return x, torch.tensor(model.calls, dtype=torch.float64)


def check(name, x, calls):
    case = load_case(name)
    torch.testing.assert_close(calls, case.tensors["mid/sigma_calls"], rtol=1e-5, atol=1e-7)
    case.close(x, "out/x")


@pytest.mark.parametrize("name", case_names("D_"))
def test_images_and_noise_levels_are_the_official_ones(name):
    x, calls = run(name)
    assert x.dtype == torch.float64
    check(name, x, calls)


PERTURBED = [
    ("D_heun_deterministic", {"rho": 6.5}),
    ("D_heun_deterministic", {"sigma_min": 0.003}),
    ("D_heun_deterministic", {"sigma_max": 79.0}),
    ("D_heun_deterministic", {"num_steps": 17}),
    ("D_heun_stochastic", {"S_churn": 2.0}),
    ("D_heun_stochastic", {"S_min": 0.1}),
    ("D_heun_stochastic", {"S_max": 20.0}),
    ("D_heun_stochastic", {"S_noise": 1.0}),
    ("D_ablation_euler_edm", {"solver": "heun"}),
    ("D_ablation_heun_alpha_churn", {"alpha": 0.75}),
    ("D_ablation_vp", {"epsilon_s": 2e-3}),
    ("D_ablation_vp", {"scaling": "none"}),
    ("D_ablation_vp_heun", {"schedule": "linear"}),
    ("D_ablation_ve", {"sigma_min": 0.03}),
    ("D_ablation_ve", {"sigma_max": 90.0}),
    ("D_ablation_ve", {"discretization": "edm"}),
    ("D_ablation_iddpm", {"C_2": 0.012}),
    ("D_ablation_iddpm", {"sigma_max": 70.0}),
    ("D_iddpm_edm_sampler_rounded", {"rho": 6.0}),
]


@pytest.mark.parametrize(("name", "change"), PERTURBED)
def test_a_wrong_constant_is_noticed(name, change):
    x, calls = run(name, **change)
    with pytest.raises(AssertionError):
        check(name, x, calls)
