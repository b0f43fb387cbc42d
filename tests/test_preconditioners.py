"""Preconditioners and noise schedules against official tables, and as mathematics."""

import math

import pytest
import torch
from golden_cases import load_case
from golden_models import model_of

from fastcm.diffusion.noise_schedules import (
    LinearSchedule,
    NoScaling,
    VESchedule,
    VPScaling,
    VPSchedule,
    iddpm_sigmas,
    karras_sigmas,
    ve_sigmas,
    vp_sigmas,
)
from fastcm.diffusion.preconditioners import EDM, IDDPM, PRECONDITIONERS, VE, VP, EDMBoundary
from fastcm.errors import ConfigError

CASES = {"A_tiny": EDM(), "A_VPPrecond": VP(), "A_VEPrecond": VE(), "A_iDDPMPrecond": IDDPM()}
SIGMAS = torch.tensor([0.03, 0.1, 0.5, 1.0, 7.0, 60.0], dtype=torch.float64)


@pytest.fixture
def tables():
    return load_case("A_precond_tables")


def test_vp_schedule_and_its_inverse_match_the_official_tables(tables):
    schedule = VPSchedule(tables.config["beta_d"], tables.config["beta_min"])
    tables.close(schedule.sigma(tables.tensors["in/t"]), "out/vp_sigma")
    tables.close(schedule.inverse(tables.tensors["in/sigma"]), "out/vp_sigma_inv")


def test_vp_range_is_exact_where_the_official_one_is_rounded(tables):
    official_min, official_max = tables.tensors["out/vp_sigma_min_max"].tolist()
    assert VP().sigma_max == pytest.approx(official_max, rel=1e-5)
    exact = tables.tensors["out/vp_sigma"][0].item()
    assert VP().sigma_min == pytest.approx(exact, rel=1e-5)
    exponent = torch.tensor(0.5 * 19.9 * 1e-10 + 0.1 * 1e-5, dtype=torch.float32)
    assert (exponent.exp() - 1).sqrt().item() == pytest.approx(official_min, rel=1e-5)


def test_iddpm_levels_match_the_official_table(tables):
    precond = IDDPM(tables.config["C_1"], tables.config["C_2"], tables.config["M"])
    tables.close(precond.levels(), "out/iddpm_u")
    tables.close(precond.round_sigma(tables.tensors["in/sigma"]), "out/iddpm_round_sigma")
    assert torch.equal(precond.index(tables.tensors["in/sigma"]), tables.tensors["out/iddpm_index"])
    tables.close(torch.tensor([precond.sigma_min, precond.sigma_max]), "out/iddpm_sigma_min_max")


def test_iddpm_levels_are_the_table_stored_with_official_weights():
    u = load_case("A_iDDPMPrecond").weights["u"]
    torch.testing.assert_close(IDDPM().levels().float(), u, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_denoised_images_match_the_official_networks(name):
    case = load_case(name)
    model = model_of(name, CASES[name])
    sigma = case.tensors["in/sigma"]
    D_x = model(case.tensors["in/x"], sigma, case.tensors.get("in/class_labels"))
    case.close(D_x, "out/D_x")
    case.close(model.precond.scalings(sigma.float()).c_noise, "mid/c_noise")


@pytest.mark.parametrize(("precond", "name"), [(EDM(), "out/D_x_train"), (EDMBoundary(0.5, 0.003), "out/D_x_eval")])
def test_ect_network_matches_in_its_training_and_its_sampling_form(precond, name):
    case = load_case("C_ecm_net")
    case.close(model_of("C_ecm_net", precond)(case.tensors["in/x"], case.tensors["in/sigma"]), name)


PERTURBED = {
    "sigma_data": ("A_tiny", EDM(0.505)),
    "beta_d": ("A_VPPrecond", VP(beta_d=19.0)),
    "beta_min": ("A_VPPrecond", VP(beta_min=0.15)),
    "M of VP": ("A_VPPrecond", VP(M=1001)),
    "C_2": ("A_iDDPMPrecond", IDDPM(C_2=0.012)),
    "M of iDDPM": ("A_iDDPMPrecond", IDDPM(M=999)),
    "form": ("A_tiny", EDMBoundary(0.5, 0.002)),
}


@pytest.mark.parametrize("constant", PERTURBED)
def test_a_wrong_constant_is_noticed(constant):
    name, precond = PERTURBED[constant]
    case = load_case(name)
    with pytest.raises(AssertionError):
        case.close(
            model_of(name, precond)(case.tensors["in/x"], case.tensors["in/sigma"], case.tensors.get("in/class_labels")),
            "out/D_x",
        )


@pytest.mark.parametrize("sigma_min", [0.002, 0.0035])
def test_a_wrong_boundary_is_noticed(sigma_min):
    case = load_case("C_ecm_net")
    with pytest.raises(AssertionError):
        case.close(
            model_of("C_ecm_net", EDMBoundary(0.5, sigma_min))(case.tensors["in/x"], case.tensors["in/sigma"]), "out/D_x_eval"
        )


def test_boundary_form_is_the_identity_at_its_boundary():
    scalings = EDMBoundary(0.5, 0.003).scalings(torch.tensor([0.003]))
    assert scalings.c_skip.item() == 1
    assert scalings.c_out.item() == 0


def test_edm_scalings_keep_input_and_target_at_unit_variance():
    c_skip, c_out, c_in, c_noise = EDM(0.5).scalings(SIGMAS)
    torch.testing.assert_close(c_in**2 * (0.25 + SIGMAS**2), torch.ones_like(SIGMAS))
    # target of F: (y - c_skip x) / c_out with independent y and noise
    variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * SIGMAS**2) / c_out**2
    torch.testing.assert_close(variance, torch.ones_like(SIGMAS))
    torch.testing.assert_close(c_noise, SIGMAS.log() / 4)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalings_keep_dtype_and_are_finite_over_the_range(name, dtype):
    precond = PRECONDITIONERS[name]()
    low, high = max(precond.sigma_min, 1e-3), min(precond.sigma_max, 1e4)
    sigma = torch.linspace(math.log(low), math.log(high), 100, dtype=dtype).exp()
    for value in precond.scalings(sigma):
        assert value.dtype == dtype
        assert value.shape == sigma.shape
        assert value.isfinite().all()


def test_vp_condition_is_accurate_in_single_precision_near_the_smallest_level():
    sigma = torch.tensor([1.1e-3, 5e-3], dtype=torch.float64)
    exact, single = VP().scalings(sigma).c_noise, VP().scalings(sigma.float()).c_noise
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_rounding_twice_is_rounding_once(name):
    precond = PRECONDITIONERS[name]()
    once = precond.round_sigma(SIGMAS)
    assert torch.equal(precond.round_sigma(once), once)
    assert precond.round_sigma(SIGMAS[2]).shape == ()


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_scalings_compile_to_one_graph(name):
    precond = PRECONDITIONERS[name]()
    compiled = torch.compile(lambda sigma: tuple(precond.scalings(sigma)), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(SIGMAS), precond.scalings(SIGMAS), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("schedule", [LinearSchedule(), VESchedule(), VPSchedule()])
def test_schedules_invert_and_differentiate(schedule):
    t = torch.linspace(0.01, 1, 20, dtype=torch.float64, requires_grad=True)
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.inverse(sigma), t)
    torch.testing.assert_close(schedule.derivative(t), torch.autograd.grad(sigma.sum(), t)[0])


@pytest.mark.parametrize("scaling", [NoScaling(), VPScaling(VPSchedule()), VPScaling(LinearSchedule())])
def test_scalings_of_the_signal_differentiate(scaling):
    t = torch.linspace(0.01, 1, 20, dtype=torch.float64, requires_grad=True)
    log_scale = scaling.scale(t).log() + 0 * t
    torch.testing.assert_close(scaling.log_derivative(t), torch.autograd.grad(log_scale.sum(), t)[0])


def test_vp_schedule_through_two_points_passes_them():
    schedule = VPSchedule.through(1e-3, 0.0123, 140.0)
    assert schedule.sigma_at(1e-3) == pytest.approx(0.0123, rel=1e-9)
    assert schedule.sigma_at(1.0) == pytest.approx(140, rel=1e-9)
    recovered = VPSchedule.through(1e-3, VPSchedule().sigma_at(1e-3), VPSchedule().sigma_at(1.0))
    assert (recovered.beta_d, recovered.beta_min) == pytest.approx((19.9, 0.1))


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_grids_descend_between_their_ends_and_stop_at_zero(num_steps):
    grids = {
        80.0: karras_sigmas(num_steps),
        VPSchedule().sigma_at(1.0): vp_sigmas(num_steps, VPSchedule()),
        100.0: ve_sigmas(num_steps),
    }
    grids[IDDPM().round_sigma(torch.tensor(81.0, dtype=torch.float64)).item()] = iddpm_sigmas(num_steps, IDDPM().levels())
    for sigma_max, grid in grids.items():
        assert grid.dtype == torch.float64
        assert len(grid) == num_steps + 1
        assert grid[0].item() == pytest.approx(sigma_max)
        assert grid[-1].item() == 0
        assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (lambda: karras_sigmas(0), "0 steps"),
        (lambda: karras_sigmas(5, 3.0, 2.0), "sigma_min 3.0"),
        (lambda: karras_sigmas(5, 0.0, 2.0), "sigma_min 0.0"),
        (lambda: ve_sigmas(5, 0.1, math.inf), "sigma_max inf"),
        (lambda: iddpm_sigmas(5, IDDPM().levels(), 0.001, 0.002), "no iDDPM noise level"),
    ],
)
def test_impossible_grids_say_why(grid, message):
    with pytest.raises(ConfigError, match=message):
        grid()
