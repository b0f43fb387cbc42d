"""What CTM draws and weighs, against the official tables."""

import math

import pytest
import torch
from golden_cases import load_case

from fastcm.objectives import CTM, ctm
from fastcm.random import Stream

WEIGHTS = {
    "snr": "snr",
    "snr+1": "snr_plus_one",
    "karras": "edm",
    "karras_weight": "edm",
    "truncated-snr": "truncated_snr",
    "uniform": "uniform",
}


@pytest.fixture(params=["F_kim_tables", "F_sony_tables"])
def case(request):
    return load_case(request.param)


@pytest.fixture
def given_uniform(monkeypatch):
    """Have the objective draw these uniform numbers, by the name of their stream."""

    def give(**values):
        class Given(Stream):
            def uniform(self, index_N, shape=(), draw=0):
                return values[self.purpose]

        monkeypatch.setattr(ctm, "Stream", Given)

    return give


def jumps_at(objective, t, s):
    """Jumps between given levels; the places, which the weight has no use for, are left out."""
    return ctm.Jumps(t, s, s, t, t)


def test_levels_at_places_between_those_of_the_grid_are_the_official_ones(case):
    for num in (18, 40):
        objective = CTM(num_levels=num, max_solver_steps=1)
        places = torch.arange(num).double()
        case.close(objective.jumps_at(places, places, 0).t_N, f"out/t_table_{num}")
        continuous = objective.jumps_at(case.tensors["in/u"] * (num - 1), torch.zeros(21), 0)
        case.close(continuous.t_N, "out/t_continuous")


@pytest.mark.parametrize(("num_levels", "num_steps"), [(5, 1), (9, 2)])  # both a quarter of the grid, the official h
def test_continuous_places_of_t_and_s_are_the_official_ones(case, given_uniform, num_levels, num_steps):
    first, second = case.tensors["in/cont_draws"]
    given_uniform(sigma=first, jump=second)
    objective = CTM(num_levels=num_levels, max_solver_steps=num_steps, continuous=True)
    jumps = objective.jumps(torch.arange(len(first)), 0, num_steps)
    case.close(jumps.t_place_N / (num_levels - 1), "out/cont_t")
    case.close((jumps.u_place_N - num_steps) / (num_levels - 1), "out/cont_t")
    s_place = case.tensors["out/cont_s"] * (num_levels - 1)
    torch.testing.assert_close(jumps.s_N, objective.grid.sigma(s_place, float(num_levels)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("official", WEIGHTS)
def test_weights_are_the_official_ones(case, official):
    objective, sigma = CTM(weight=WEIGHTS[official]), case.tensors["in/sigma"]
    case.close(objective.weight_of(jumps_at(objective, sigma, 0.3 * sigma)), f"out/weight_{official}")


def test_weight_of_the_gap_is_the_official_one_to_the_power_one(case):
    objective, sigma = CTM(weight="uniform_g"), case.tensors["in/sigma"]
    weight = objective.weight_of(jumps_at(objective, sigma, 0.3 * sigma))
    case.close(weight ** case.config["uniform_g"]["multiplier"], "out/weight_uniform_g")


@pytest.mark.parametrize("num_steps", [1, 5, 17])
def test_pairs_of_t_and_s_are_those_that_the_official_code_can_draw(case, num_steps):
    objective = CTM()
    jumps = objective.jumps(torch.arange(30_000), 0, num_steps)
    table = objective.grid.sigma(torch.arange(18.0), 18.0)
    places = [(table - level[:, None]).abs().argmin(1) for level in (jumps.t_N, jumps.s_N)]
    found = torch.zeros(18, 18).index_put_(tuple(places), torch.ones(30_000), accumulate=True)
    possible = {(t, s) for t in range(18 - num_steps) for s in range(t + num_steps, 18)}
    assert {tuple(pair) for pair in found.nonzero().tolist()} == possible
    official = torch.stack([case.tensors[f"out/{name}_idx_d18h{num_steps}"] for name in "ts"], 1)
    assert {tuple(pair) for pair in official.tolist()} <= possible
    expected = torch.zeros(18, 18)  # t uniform over what leaves room for the steps, s uniform from u down
    for t, s in possible:
        expected[t, s] = 30_000 / (18 - num_steps) / (18 - t - num_steps)
    assert (found - expected).abs().max() <= 5 * expected.max().sqrt()
    used = expected > 0
    assert ((found - expected)[used].square() / expected[used]).sum() < len(possible) + 5 * math.sqrt(2 * len(possible))


def test_official_t_of_a_fine_grid_lie_in_our_range(case):
    jumps = CTM(num_levels=40, max_solver_steps=39).jumps(torch.arange(20_000), 0, 3)
    ours, official = jumps.t_place_N, case.tensors["out/t_idx_d40h3s"]
    assert [ours.min().item(), ours.max().item()] == [0, 36]
    assert ours.min() <= official.min()
    assert official.max() <= ours.max()


def test_denoising_levels_are_the_official_ones(case):
    objective = CTM(dsm_place=case.config["diffusion_mult"])
    normal, uniform = (case.tensors[f"in/halflognormal_{kind}"].repeat(2) for kind in ("randn", "rand"))
    half = len(normal) // 2
    number = torch.cat([torch.arange(half) * 2, torch.arange(half) * 2 + 1])  # theirs has the lognormal half first
    case.close(objective.dsm_sigma_at(number, normal, uniform), "out/halflognormal_sigmas")


def test_the_two_kinds_of_denoising_levels_have_draws_of_their_own():
    objective, index = CTM(), torch.arange(1000, 1200)
    stream = Stream(3, "dsm_sigma")
    sigma, normal, uniform = objective.dsm_sigma(index, 3), stream.normal(index), stream.uniform(index, draw=1)
    torch.testing.assert_close(sigma[::2], (-1.2 + 1.2 * normal[::2]).exp())
    torch.testing.assert_close(sigma[1::2], objective.grid.sigma(0.7 * 17 * uniform[1::2], 18.0))


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected).square() / expected).sum().item()


def test_number_of_solver_steps_has_the_official_distribution(case):
    steps = torch.arange(1, 18, dtype=torch.float64)
    probabilities = steps / steps.sum()
    official = case.tensors["out/heun_steps_weighted_hist"].double()
    assert official.sum() == case.config["heun"]["draws"]
    bound = 16 + 5 * math.sqrt(32)  # mean and five deviations of 16 degrees of freedom
    assert chi_square(official, probabilities) < bound
    objective = CTM(max_solver_steps=case.config["heun"]["num_heun_step"])
    drawn = torch.tensor([objective.num_solver_steps(1, first) for first in range(0, 24_000, 8)])
    assert chi_square(torch.bincount(drawn, minlength=18)[1:].double(), probabilities) < bound
    assert drawn.max() == 17


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rho": 6.0}, "out/t_table_18"),
        ({"sigma_min": 0.0021}, "out/t_table_18"),
        ({"sigma_max": 81.0}, "out/t_table_18"),
        ({"num_levels": 19}, "out/t_table_18"),
        ({"p_mean": -1.1}, "out/halflognormal_sigmas"),
        ({"p_std": 1.3}, "out/halflognormal_sigmas"),
        ({"dsm_place": 0.8}, "out/halflognormal_sigmas"),
    ],
)
def test_a_wrong_constant_is_noticed(case, change, name):
    objective = CTM(**change)
    if name == "out/t_table_18":
        places = torch.arange(18).double()
        found = objective.jumps_at(places, places, 0).t_N
    else:
        normal, uniform = (case.tensors[f"in/halflognormal_{kind}"].repeat(2) for kind in ("randn", "rand"))
        found = objective.dsm_sigma_at((torch.arange(10) >= 5).long(), normal, uniform)
    with pytest.raises(AssertionError):
        case.close(found, name)
