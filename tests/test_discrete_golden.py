"""Discrete consistency objectives and progressive distillation against OpenAI's code: grids, schedules, losses, gradients."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from golden_cases import load_case
from golden_models import batch_of, openai_model_of

from fastcm.diffusion.consistency import consistency_weight
from fastcm.diffusion.grid import Grid
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM, EDMBoundary
from fastcm.io.openai_layout import to_openai
from fastcm.model import one_hot
from fastcm.objectives import ConsistencyTraining, EDMObjective, Networks, ProgressiveDistillation
from fastcm.objectives.discrete import DiscreteConsistency
from fastcm.sampling import sample_ancestral, sample_consistency, sample_dpm, sample_euler, sample_heun

DISTANCES = {"l2": "squared", "l1": "l1", "l2-32": "squared_32"}
WEIGHTS = {
    "uniform": "uniform",
    "snr": "snr",
    "snr+1": "snr_plus_one",
    "karras": "edm",
    "truncated-snr": "truncated_snr",
}
SCHEDULES = load_case("E_ema_and_scales").config["rows"]


def networks_of(precond):
    """Student, target 0.9 times and teacher 1.1 times its weights, as in the golden cases."""
    student = openai_model_of("E_unet_cond", precond)
    target, teacher = (scaled(student, factor) for factor in (0.9, 1.1))
    teacher.precond = EDM()
    return Networks(student, target, teacher)


def scaled(model, factor):
    other = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor)
    return other


def batch_for(case):
    return batch_of(case.tensors["in/x_start"], one_hot(case.tensors["in/y"], 10))


def assert_loss_and_gradients(case, loss_N, student, resized=1):
    """Official losses are means over pixels, ours sums; ``resized`` is how many more pixels the distance looks at."""
    pixels = case.tensors["in/x_start"][0].numel() * resized
    case.close(loss_N.detach() / pixels, "out/loss")
    (loss_N.mean() / pixels).backward()
    gradients = to_openai({name: p.grad for name, p in student.net.named_parameters()}, student.net)
    norms = torch.stack([gradients[name].norm() for name in case.name_lists["out/grad_norms"]])
    case.close(norms, "out/grad_norms")


def discrete_loss(name, **changes):
    case = load_case(name)
    networks = networks_of(EDMBoundary(0.5, 0.002))
    solver = "heun" if "_cd_" in name else "none"
    options = {"distance": DISTANCES[case.config["loss_norm"]], "weight": WEIGHTS[case.config["weight_schedule"]]}
    grid = {"end_scales": 18, "target": "fixed", "target_halflife_images": 1.0}
    objective = DiscreteConsistency(**({"solver": solver} | grid | options | changes))
    levels = float(objective.scale_schedule.num_levels(0))
    index, noise = case.tensors["in/indices"].float(), case.tensors["in/noise"]
    return case, objective.loss_at(networks, batch_for(case), index, levels, noise).loss_N, networks.student


@pytest.mark.parametrize("name", ["ct_l2", "ct_l1", "ct_l2_32", "cd_l2", "cd_l1"])
def test_consistency_losses_and_their_gradients_are_the_official_ones(name):
    case, loss_N, student = discrete_loss(f"E_loss_{name}")
    assert_loss_and_gradients(case, loss_N, student, resized=4 if name.endswith("32") else 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cd_l2", {"solver": "euler"}),
        ("cd_l2", {"target": "student"}),
        ("cd_l2", {"end_scales": 19}),
        ("cd_l2", {"sigma_min": 0.0025}),
        ("ct_l2", {"rho": 6.9}),
        ("ct_l2", {"weight": "snr"}),
        ("ct_l2", {"distance": "l2"}),
    ],
)
def test_a_wrong_choice_in_a_consistency_loss_is_noticed(name, change):
    case, loss_N, student = discrete_loss(f"E_loss_{name}", **change)
    with pytest.raises(AssertionError):
        assert_loss_and_gradients(case, loss_N, student)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr"])
def test_progressive_distillation_is_the_official_one(weight):
    case = load_case("E_loss_progdist")
    networks = networks_of(EDM())
    objective = ProgressiveDistillation(weight=weight)
    levels = case.config["num_scales"] + 1
    index, noise = case.tensors["in/indices"].float(), case.tensors["in/noise"]
    loss_N = objective.loss_at(networks, batch_for(case), index, levels, noise).loss_N
    if weight == "truncated_snr":
        assert_loss_and_gradients(case, loss_N, networks.student)
    else:
        with pytest.raises(AssertionError):
            assert_loss_and_gradients(case, loss_N, networks.student)


def test_denoising_score_matching_of_openai_networks_is_the_official_one():
    case = load_case("E_loss_dsm")
    student = openai_model_of("E_unet_cond", EDM())
    loss_N = EDMObjective().loss_at(student, batch_for(case), case.tensors["in/sigmas"], case.tensors["in/noise"]).loss_N
    assert_loss_and_gradients(case, loss_N, student)


@pytest.mark.parametrize("i", range(len(SCHEDULES)))
def test_number_of_levels_and_target_average_are_the_official_ones(i):
    case, row = load_case("E_ema_and_scales"), SCHEDULES[i]
    steps, batch = case.tensors["in/step"].tolist(), 512
    if row["scale_mode"] == "progdist":
        options = {"start_steps": row["start_scales"], "end_steps": row["end_scales"]}
        objective = ProgressiveDistillation(stage_images=row["distill_steps_per_iter"] * batch, **options)
        levels = [int(objective.schedule(step * batch)["num_steps"]) for step in steps]
    else:
        # A fixed grid takes its size from the start in the official code, from the end in ours.
        end = row["start_scales"] if row["scale_mode"] == "fixed" else row["end_scales"]
        objective = ConsistencyTraining(
            scales=row["scale_mode"],
            start_scales=row["start_scales"],
            end_scales=end,
            scales_images=row["total_steps"] * batch,
            target=row["target_ema_mode"],
            target_halflife_images=-batch * math.log(2) / math.log(row["start_ema"]),
        )
        levels = [int(objective.schedule(step * batch)["num_levels"]) for step in steps]
        averages = [0.5 ** (batch / objective.target_halflife(step * batch)) for step in steps]
        case.close(torch.tensor(averages, dtype=torch.float64), f"out/ema_{i}")
    assert levels == case.tensors[f"out/scales_{i}"].tolist()


def test_weights_are_the_official_ones():
    case = load_case("E_tables")
    sigma = case.tensors["in/sigma"]
    for theirs, ours in WEIGHTS.items():
        case.close(consistency_weight(sigma, sigma / 2, ours, 0.5), f"out/weight_{theirs}")


@pytest.mark.parametrize("levels", [10, 18, 40])
def test_grid_is_the_official_one(levels):
    case = load_case("E_tables")
    sigma = Grid(0.002, 80.0, 7.0).sigma(torch.arange(levels, dtype=torch.float64), float(levels))
    case.close(torch.cat([sigma, sigma.new_zeros(1)]), f"out/sigmas_karras_{levels}")


def sampled(name, precond, sampler, sigmas, **options):
    case = load_case(name)
    model = openai_model_of("E_unet_cond", precond)
    clip = 1.0 if case.config["clip_denoised"] else float("inf")
    denoiser = lambda x, sigma, **extra: model(x, sigma, **extra).clamp(-clip, clip)  # noqa: E731
    x = case.tensors["in/x_T_unit"].double() * 80.0
    labels = one_hot(case.tensors["in/y"], 10)
    return case, sampler(denoiser, x, torch.as_tensor(sigmas), labels=labels, **options).clamp(-1, 1)


BOUNDARY = EDMBoundary(0.5, 0.002)


@pytest.mark.parametrize("name", ["E_sample_onestep", "E_sample_onestep_noclip"])
def test_one_step_is_the_official_one(name):
    case, x = sampled(name, BOUNDARY, sample_consistency, [80.0, 0.0])
    case.close(x, "out/x")


def test_multistep_starts_again_from_sigma_min_as_the_official_one_does():
    levels = karras_sigmas(40)
    noise = load_case("E_sample_multistep").tensors["in/noises"]
    for floor, equal in ((0.002, True), (0.3, False)):
        case, x = sampled(
            "E_sample_multistep",
            BOUNDARY,
            sample_consistency,
            [80.0, levels[22], 0.0],
            noise=lambda step: noise[step - 1],
            sigma_min=floor,
        )
        with nullcontext() if equal else pytest.raises(AssertionError):
            case.close(x, "out/x")


DIFFUSION_SAMPLERS = {
    "heun": (sample_heun, {}),
    "heun_churn": (sample_heun, {}),
    "euler": (sample_euler, {}),
    "ancestral": (sample_ancestral, {}),
    "dpm": (sample_dpm, {"midpoint_rho": 3.0}),
    "dpm_churn": (sample_dpm, {"midpoint_rho": 3.0}),
}


def diffusion_sampled(name, **changes):
    """(case, images) of a diffusion sampler with the case's own constants and recorded noise, but for ``changes``."""
    case, (sampler, options) = load_case(f"E_sample_{name}"), DIFFUSION_SAMPLERS[name]
    config, noises = case.config, case.tensors.get("in/noises")
    options = options | {key: value for key, value in config.items() if key.startswith("s_")}
    if noises is not None:
        options["noise"] = lambda step: noises[step]
    return sampled(f"E_sample_{name}", EDM(), sampler, karras_sigmas(config["steps"]), **options | changes)


@pytest.mark.parametrize("name", DIFFUSION_SAMPLERS)
def test_samplers_of_diffusion_models_are_the_official_ones(name):
    case, x = diffusion_sampled(name)
    case.close(x, "out/x")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("heun_churn", {"s_churn": 1.5}),
        ("heun_churn", {"s_tmin": 0.6}),
        ("heun_churn", {"s_tmax": 10.0}),
        ("heun_churn", {"s_noise": 1.0}),
        ("ancestral", {"eta": 0.9}),
        ("dpm", {"midpoint_rho": 7.0}),
        ("dpm", {"midpoint_rho": math.inf}),
        ("dpm_churn", {"s_churn": 0.8}),
        ("dpm_churn", {"s_noise": 1.01}),
    ],
)
def test_a_wrong_constant_of_a_sampler_is_noticed(name, change):
    case, x = diffusion_sampled(name, **change)
    with pytest.raises(AssertionError):
        case.close(x, "out/x")


def test_sampler_of_progressive_distillation_is_the_official_one():
    levels = karras_sigmas(load_case("E_sample_progdist").config["steps"] + 1)
    case, x = sampled("E_sample_progdist", EDM(), sample_euler, levels[:-1])
    case.close(x, "out/x")
