"""Easy Consistency Tuning against the official code: mapping, stages, losses, gradients, few-step generator."""

import pytest
import torch
from golden_cases import case_names, load_case
from golden_models import assert_gradients_match, batch_of, model_of

from fastcm.diffusion.consistency import consistency_weight, stage_decay, stage_of, t_to_r
from fastcm.diffusion.noise_distributions import lognormal_sigma
from fastcm.diffusion.preconditioners import EDM, EDMBoundary
from fastcm.objectives import ECT
from fastcm.objectives.consistency import noise_pair, pair_loss
from fastcm.sampling import sample_consistency

LOSSES = case_names("C_ecm_loss")
ROWS = load_case("C_t_to_r").config["rows"]


def decay_of(row):
    return torch.tensor(stage_decay(row["stage"], row["q"]))


def mapped(row, **changes):
    row = row | changes
    return t_to_r(load_case("C_t_to_r").tensors["in/t"], decay_of(row), row["adj"], row["k"], row["b"])


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_mapping_from_t_to_r_is_the_official_one(i):
    r = mapped(ROWS[i])
    load_case("C_t_to_r").close(r, f"out/r{i:02d}")
    assert (r == 0).sum() == ROWS[i]["n_clamped_to_zero"]
    assert 1 - stage_decay(ROWS[i]["stage"], ROWS[i]["q"]) == pytest.approx(ROWS[i]["ratio"], abs=1e-12)


@pytest.mark.parametrize("change", [{"q": 2.02}, {"stage": 1}, {"k": 8.1}, {"b": 1.02}, {"adj": "const"}])
def test_a_wrong_constant_of_the_mapping_is_noticed(change):
    with pytest.raises(AssertionError):
        load_case("C_t_to_r").close(mapped(ROWS[0], **change), "out/r00")


def test_stages_switch_where_a_resumed_official_run_switches():
    case = load_case("C_schedule")
    images_per_tick, double_ticks = case.config["kimg_per_tick"] * 1000, case.config["double_ticks"]
    ticks = case.tensors["in/tick"].tolist()
    stages = [stage_of(tick * images_per_tick, double_ticks * images_per_tick, 1000) for tick in ticks]
    assert stages == case.tensors["out/stage_resumed"].tolist()
    # An official run that was never interrupted enters a stage one tick after its first image, and only there differs.
    running = case.tensors["out/stage_running"].tolist()
    late = [tick for tick, ours, theirs in zip(ticks, stages, running, strict=True) if ours != theirs]
    assert late == [tick for tick in ticks if tick > 0 and tick % double_ticks == 0]
    decays = torch.tensor([stage_decay(stage, case.config["q"]) for stage in running], dtype=torch.float64)
    case.close(1 - decays, "out/ratio_running")


def test_schedule_counts_images_and_stops_at_the_last_stage():
    objective = ECT(q=4.0, double_images=1000, max_stage=2)
    decays = [objective.schedule(images)["decay"] for images in (0, 999, 1000, 1999, 2000, 10**9)]
    assert decays == [1 / 4, 1 / 4, 1 / 16, 1 / 16, 1 / 64, 1 / 64]


def objective_of(case, **changes):
    config = case.config
    constants = {name.lower(): config[name] for name in ("P_mean", "P_std", "sigma_data", "q", "k", "b", "c")}
    distance = "pseudo_huber" if config["c"] > 0 else "l2"
    return ECT(**(constants | {"mapping": config["adj"], "distance": distance} | changes))


def loss_of(case, objective, stage=None):
    """(pair, loss per image, model) with the draws of the golden case and the scalings of its network mode."""
    sampling = case.config["net_mode"] == "eval"
    precond = objective.sampling_precond if sampling else objective.precond
    model = model_of("C_ecm_net", precond)
    batch, noise = batch_of(case.tensors["in/images"]), case.tensors["in/eps"]
    t = lognormal_sigma(case.tensors["in/rnd_normal"].flatten(), objective.p_mean, objective.p_std)
    decay = torch.tensor(stage_decay(case.config["stage"] if stage is None else stage, objective.q))
    r = t_to_r(t, decay, objective.mapping, objective.k, objective.b)
    pair = noise_pair(batch.images, noise, t, r, precond)
    if not sampling:
        return pair, objective.loss_at(model, batch, t, noise, decay).loss_N, model
    weight = consistency_weight(t, r, objective.weight, objective.sigma_data)
    loss = pair_loss(model, model, pair, batch, weight, distance=objective.distance, c=objective.c)
    return pair, loss, model


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_official_ones(name):
    case = load_case(name)
    pair, loss, model = loss_of(case, objective_of(case))
    case.close(pair.at_t.sigma_N[:, None, None, None], "mid/t")
    case.close(torch.where(pair.boundary_N, 0, pair.at_r.sigma_N)[:, None, None, None], "mid/r")
    assert pair.boundary_N.sum() == case.config["n_r_zero"]
    case.close(loss, "out/loss")
    case.close(loss.mean(), "out/loss_mean")
    loss.mean().backward()
    assert_gradients_match(case, model)


@pytest.mark.parametrize("name", LOSSES)
def test_student_and_target_images_are_the_official_ones(name):
    case = load_case(name)
    pair, _, model = loss_of(case, objective_of(case))
    case.close(model(pair.at_t.x_NCHW, pair.at_t.sigma_N), "mid/D_yt")
    inner = ~pair.boundary_N
    actual = model(pair.at_r.x_NCHW[inner], pair.at_r.sigma_N[inner])
    torch.testing.assert_close(
        actual, case.tensors["mid/D_yr"][inner], rtol=case.tolerance["rtol"], atol=case.tolerance["atol"]
    )


PERTURBED = [
    ("C_ecm_loss_0_train", {"p_mean": -1.09}),
    ("C_ecm_loss_0_train", {"p_std": 2.02}),
    ("C_ecm_loss_0_train", {"sigma_data": 0.51}),
    ("C_ecm_loss_0_train", {"q": 2.02}),
    ("C_ecm_loss_0_train", {"k": 8.1}),
    ("C_ecm_loss_0_train", {"b": 1.05}),
    ("C_ecm_loss_0_train", {"mapping": "const"}),
    ("C_ecm_loss_0_train", {"distance": "squared"}),
    ("C_ecm_loss_0_train", {"weight": "edm"}),
    ("C_ecm_loss_1_train", {"c": 0.04}),
    ("C_ecm_loss_1_train", {"distance": "l2"}),
    ("C_ecm_loss_1_eval", {"boundary_sigma": 0.002}),
]


@pytest.mark.parametrize(("name", "change"), PERTURBED)
def test_a_wrong_constant_of_the_loss_is_noticed(name, change):
    case = load_case(name)
    _, loss, _ = loss_of(case, objective_of(case, **change))
    with pytest.raises(AssertionError):
        case.close(loss, "out/loss")


def test_a_wrong_stage_is_noticed():
    case = load_case("C_ecm_loss_1_train")
    _, loss, _ = loss_of(case, objective_of(case), stage=4)
    with pytest.raises(AssertionError):
        case.close(loss, "out/loss")


def test_training_does_not_use_the_sampling_form():
    case = load_case("C_ecm_loss_1_eval")
    assert objective_of(case).precond == EDM(0.5)
    assert objective_of(case).sampling_precond == EDMBoundary(0.5, 0.003)


def generated(case, boundary_sigma=0.003, **changes):
    config = case.config | changes
    sigmas = torch.tensor([config["t_max"], *(config["mid_t"] or []), 0.0], dtype=torch.float64)
    noises = case.tensors.get("in/noises")
    model = model_of("C_ecm_net", EDMBoundary(0.5, boundary_sigma))
    return sample_consistency(model, case.tensors["in/latents"] * sigmas[0], sigmas, noise=lambda step: noises[step - 1])


@pytest.mark.parametrize("name", case_names("C_generator"))
def test_few_step_images_are_the_official_ones(name):
    case = load_case(name)
    x = generated(case)
    assert x.dtype == torch.float64
    case.close(x, "out/x")


@pytest.mark.parametrize("change", [{"t_max": 79.0}, {"mid_t": [0.9]}, {"mid_t": [0.83]}, {"boundary_sigma": 0.01}])
def test_a_wrong_constant_of_the_generator_is_noticed(change):
    case = load_case("C_generator_2step")
    with pytest.raises(AssertionError):
        case.close(generated(case, **change), "out/x")
