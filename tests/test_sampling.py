"""Samplers and ``sample``: exactness on a known ODE, evaluation counts, reproducibility at any batch size."""

import inspect
import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from fastcm.cli.samples import sample as sample_command
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM, IDDPM, VE, VP, EDMBoundary
from fastcm.errors import ConfigError
from fastcm.model import Model
from fastcm.nn import UNet
from fastcm.random import Stream
from fastcm.sampling import (
    Ablation,
    consistency_sigmas,
    sample,
    sample_ablation,
    sample_ancestral,
    sample_consistency,
    sample_dpm,
    sample_euler,
    sample_heun,
)
from fastcm.sampling.churn import Churn
from fastcm.sampling.common import clip_range
from fastcm.sampling.generate import SAMPLERS, SamplerOptions, choose_labels

SHAPE = (3, 8, 8)
SIGMA_DATA = 0.5


def gaussian(x, sigma):
    """The ideal denoiser of images with independent N(0, 0.5^2) pixels."""
    return SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma[:, None, None, None].double() ** 2) * x.double()


def start(num=3, sigma=80.0):
    return Stream(0, "latents").image_normal(torch.arange(num), SHAPE).double() * sigma


def exact(x, sigma=80.0):
    """Where the probability flow ODE of ``gaussian`` takes x."""
    return x * SIGMA_DATA / math.sqrt(SIGMA_DATA**2 + sigma**2)


def noise(step, num=3):
    return Stream(0, "sampler_noise").image_normal(torch.arange(num), SHAPE, draw=step)


class Counter(nn.Module):
    """A network that counts its evaluations and the images in them."""

    def __init__(self):
        super().__init__()
        self.gain, self.sizes = nn.Parameter(torch.tensor(0.3)), []

    def forward(self, x, c_noise, labels=None, augment=None, dropout=None):
        self.sizes.append(len(x))
        shift = 0 if labels is None else labels.argmax(1)[:, None, None, None]
        return self.gain * x + shift


def counting_model(precond=None, label_dim=0):
    return Model(Counter(), precond or EDM(), SHAPE, label_dim)


def unet_model(precond=None, label_dim=0):
    net = UNet("ddpmpp", 8, 3, label_dim=label_dim, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    return Model(net.init_weights(0), precond or EDM(), SHAPE, label_dim)


def error(sampler, num_steps, **options):
    x = start()
    return (sampler(gaussian, x, karras_sigmas(num_steps), **options) - exact(x)).abs().max().item()


@pytest.mark.parametrize(("sampler", "options"), [(sample_heun, {}), (sample_dpm, {}), (sample_dpm, {"midpoint_rho": 3.0})])
def test_heun_and_dpm_converge_with_second_order(sampler, options):
    coarse, fine = error(sampler, 32, **options), error(sampler, 64, **options)
    assert fine < 1e-2
    assert 3 < coarse / fine < 6


def test_euler_converges_with_first_order():
    def euler(model, x, sigmas):
        return sample_ablation(model, x, sigmas, Ablation(solver="euler"))

    coarse, fine = error(euler, 128), error(euler, 256)
    assert 1.7 < coarse / fine < 2.4


@pytest.mark.parametrize("s_churn", [0.0, 3.0])
def test_generalised_sampler_contains_heun(s_churn):
    sigmas, churn = karras_sigmas(9), {"s_churn": s_churn, "s_tmax": 50.0, "noise": noise}
    general = sample_ablation(gaussian, start(), sigmas, Ablation(), **churn)
    torch.testing.assert_close(general, sample_heun(gaussian, start(), sigmas, **churn))


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("scheme", [{"schedule": "ve"}, {"schedule": "vp", "scaling": "vp"}, {"discretization": "vp"}])
def test_every_scheme_solves_the_same_equation(alpha, scheme):
    options = Ablation(alpha=alpha, sigma_min=0.002, sigma_max=80.0, **scheme)
    sigmas = options.sigmas(256, gaussian)
    x = start()
    torch.testing.assert_close(sample_ablation(gaussian, x, sigmas, options), exact(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("sampler", "num_steps", "options"),
    [
        (sample_heun, 200, {"s_churn": 40.0}),
        (sample_dpm, 200, {"s_churn": 40.0}),
        (sample_ancestral, 400, {}),  # of first order: 200 steps leave the deviation 3 % short, 400 half of that
        (sample_ancestral, 400, {"eta": 0.7}),
    ],
)
def test_fresh_noise_keeps_the_distribution(sampler, num_steps, options):
    x = start(32)
    images = sampler(gaussian, x, karras_sigmas(num_steps), noise=lambda step: noise(step, 32), **options)
    assert images.std().item() == pytest.approx(SIGMA_DATA, rel=0.03)
    correlation = (images * exact(x)).mean() / (images.std() * exact(x).std())
    assert correlation < 0.9


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_a_step_of_ancestral_sampling_draws_from_the_posterior(eta):
    """N((s / t)^2 x_t + (1 - (s / t)^2) x_0, s^2 (1 - (s / t)^2)) at eta 1, and DDIM's form of it below."""
    t, s, x = 2.0, 0.6, start(sigma=2.0)
    clean = gaussian(x, torch.full((3,), t, dtype=torch.float64))
    deviation = eta * s * math.sqrt(1 - (s / t) ** 2)
    share = math.sqrt(s**2 - deviation**2) / t
    assert share == pytest.approx((s / t) ** 2) or eta < 1
    expected = share * x + (1 - share) * clean + deviation * noise(0)
    sigmas = torch.tensor([t, s], dtype=torch.float64)
    actual = sample_ancestral(gaussian, x, sigmas, noise=noise, eta=eta)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_ancestral_sampling_without_noise_is_euler():
    sigmas = karras_sigmas(6)
    torch.testing.assert_close(sample_ancestral(gaussian, start(), sigmas, eta=0.0), sample_euler(gaussian, start(), sigmas))


def test_midpoint_of_dpm_is_halfway_in_log_sigma_or_in_a_power_of_it():
    levels, sigmas = [], torch.tensor([8.0, 2.0, 0.0], dtype=torch.float64)

    def model(x, sigma):
        levels.append(sigma[0].item())
        return 0 * x

    sample_dpm(model, start(), sigmas)
    assert levels == pytest.approx([8, 4, 2])
    levels.clear()
    sample_dpm(model, start(), sigmas, midpoint_rho=3.0)
    assert levels == pytest.approx([8, ((2 + 2 ** (1 / 3)) / 2) ** 3, 2, 2 / 8])


def test_one_step_of_consistency_sampling_is_one_evaluation():
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    x = sample_consistency(model, start(), consistency_sigmas(1))
    assert torch.equal(x, gaussian(start().float(), torch.full((3,), 80.0)).double())
    assert len(calls) == 1


def test_consistency_sampling_adds_noise_up_to_the_next_level():
    seen = []
    x = sample_consistency(lambda x, sigma: seen.append(x) or 0 * x, start(), consistency_sigmas(3, (5.0, 1.0)), noise=noise)
    torch.testing.assert_close(seen[1], 5.0 * noise(1))
    torch.testing.assert_close(seen[2], 1.0 * noise(2))
    seen.clear()
    sample_consistency(lambda x, sigma: seen.append(x) or 0 * x, x, consistency_sigmas(2), noise=noise, sigma_min=0.5)
    torch.testing.assert_close(seen[1], math.sqrt(0.821**2 - 0.5**2) * noise(1))


def test_default_levels_are_the_published_two_step_level_and_geometric_beyond():
    assert consistency_sigmas(1).tolist() == [80, 0]
    assert consistency_sigmas(2).tolist() == pytest.approx([80, 0.821, 0])
    levels = consistency_sigmas(4)
    assert levels.tolist()[-2:] == pytest.approx([0.821, 0])
    ratios = levels[1:-1] / levels[:-2]
    torch.testing.assert_close(ratios, ratios[0].expand(3))


@pytest.mark.parametrize("sample", [sample_heun, sample_euler, sample_dpm, sample_ancestral, sample_consistency])
def test_callback_sees_every_step_of_an_outside_denoiser(sample):
    steps = []
    x = sample(gaussian, start(), karras_sigmas(4), noise=noise, callback=steps.append)
    assert [step["i"] for step in steps] == [0, 1, 2, 3]
    assert all(set(step) == {"x", "i", "sigma", "sigma_hat", "denoised"} for step in steps)
    assert steps[0]["sigma"].item() == pytest.approx(80)
    # All end on the last denoised image: to 0, a slope leads there exactly, and the last step of all is Euler's.
    torch.testing.assert_close(x, steps[-1]["denoised"])


def test_samplers_return_double_precision_without_a_graph():
    model = counting_model()
    for x in (sample_heun(model, start(), karras_sigmas(3)), sample_consistency(model, start(), consistency_sigmas(1))):
        assert x.dtype == torch.float64
        assert not x.requires_grad


@pytest.mark.parametrize(
    ("steps", "sampler", "evaluations"),
    [
        *((1, "consistency", 1), (2, "consistency", 2), (5, "heun", 9), (1, "heun", 1)),
        *((5, "dpm", 9), (1, "dpm", 1), (5, "ancestral", 5), (5, "euler", 5)),
    ],
)
def test_number_of_network_evaluations(steps, sampler, evaluations):
    model = counting_model()
    sample(model, 7, steps, 0, sampler=sampler, batch_size=3)
    assert model.net.sizes == [3] * evaluations + [3] * evaluations + [1] * evaluations


@pytest.mark.parametrize("label_dim", [0, 4])
@pytest.mark.parametrize(
    ("steps", "sampler", "options"),
    [
        *((4, "heun", {}), (4, "heun", {"s_churn": 2.0}), (3, "consistency", {}), (4, "ancestral", {})),
        *((4, "dpm", {}), (4, "dpm", {"s_churn": 2.0, "s_noise": 1.003, "s_tmin": 0.05, "s_tmax": 50.0})),
    ],
)
def test_images_are_the_same_at_any_batch_size(steps, sampler, options, label_dim):
    model = unet_model(EDMBoundary() if sampler == "consistency" else EDM(), label_dim)
    together = sample(model, 6, steps, 1, sampler=sampler, **options)
    assert together.shape == (6, *SHAPE)
    assert together.dtype == torch.float32
    apart = sample(model, 6, steps, 1, sampler=sampler, batch_size=4, **options)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    later = sample(model, 2, steps, 1, sampler=sampler, index_offset=3, **options)
    torch.testing.assert_close(later, together[3:5], rtol=1e-4, atol=1e-4)


def test_latents_are_bit_identical_at_any_batch_size():
    seen = []

    class Keep(Counter):
        def forward(self, x, c_noise, **conditions):
            seen.append(x)
            return x

    model = Model(Keep(), EDM(), SHAPE)
    for batch_size in (5, 2, 1):
        sample(model, 5, 2, 9, sampler="consistency", batch_size=batch_size)
    together = torch.cat(seen[:2])
    halves = torch.cat([seen[i] for i in (2, 4, 6, 3, 5, 7)])
    singles = torch.cat([seen[i] for i in (*range(8, 18, 2), *range(9, 18, 2))])
    assert torch.equal(halves, together)
    assert torch.equal(singles, together)


def test_seed_decides_the_images_and_the_global_generator_does_not():
    model, before = counting_model(), torch.get_rng_state()
    first, again, other = (sample(model, 2, 3, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any(dim=(1, 2, 3)).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("heun", {"s_churn": 40.0}),
        ("heun", {"s_tmin": 1.0, "s_churn": 2.0}),
        ("dpm", {"s_churn": 2.0}),
        ("dpm", {"midpoint_rho": 3.0}),
        ("ancestral", {"eta": 0.5}),
    ],
)
def test_options_reach_the_sampler(sampler, options):
    model = counting_model()
    given = sample(model, 3, 6, 4, sampler=sampler, **options)
    x = Stream(4, "latents").image_normal(torch.arange(3), SHAPE).double() * 80.0
    fresh = lambda step: Stream(4, "sampler_noise").image_normal(torch.arange(3), SHAPE, draw=step)  # noqa: E731
    direct = SAMPLERS[sampler].run(model, x, karras_sigmas(6), noise=fresh, **options)
    torch.testing.assert_close(given, direct.float())
    assert not torch.allclose(sample(model, 3, 6, 4, sampler=sampler), given, atol=1e-3)


def test_churn_raises_a_level_within_its_bounds_by_at_most_the_root_of_two():
    churn, levels = Churn(s_churn=4.0, s_tmin=0.5, s_tmax=8.0), torch.tensor([0.4, 0.5, 8.0, 9.0], dtype=torch.float64)
    raised = torch.stack([churn.sigma_hat(gaussian, level, 16) for level in levels])
    torch.testing.assert_close(raised / levels, torch.tensor([1, 1.25, 1.25, 1], dtype=torch.float64))
    assert churn.sigma_hat(gaussian, levels[1], 2).item() == pytest.approx(0.5 * math.sqrt(2), rel=1e-14)
    assert churn.sigma_hat(gaussian, levels[1], 120).item() == pytest.approx(0.5 * (1 + 1 / 30), rel=1e-14)
    assert churn.standard_deviation(levels[0], levels[1]).item() == pytest.approx(0.3)


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpm", "ancestral", "consistency"])
def test_sampling_never_waits_for_the_device(sampler):
    images = sample(unet_model(label_dim=4).to("meta"), 5, 3, 0, sampler=sampler, batch_size=2)
    assert images.is_meta


@pytest.mark.parametrize("options", [Ablation(), Ablation(schedule="vp", scaling="vp", discretization="vp")])
def test_churned_samplers_never_wait_for_the_device(options):
    x, sigmas = start().to("meta"), options.sigmas(4, gaussian, "meta")
    extra = {"s_churn": 2.0, "noise": lambda step: noise(step).to("meta")}
    assert sample_heun(gaussian, x, sigmas, **extra).is_meta
    assert sample_dpm(gaussian, x, sigmas, **extra).is_meta
    assert sample_ablation(gaussian, x, sigmas, options, **extra).is_meta


@pytest.mark.parametrize(("sampler", "options"), [("heun", {}), ("dpm", {}), ("dpm", {"midpoint_rho": 3.0}), ("ancestral", {})])
@pytest.mark.parametrize("precond", [EDM(), EDMBoundary(), VP(), VE(), IDDPM()])
def test_network_is_evaluated_inside_its_range_only(precond, sampler, options):
    sigmas = []

    class Keep(Model):
        def forward(self, x_NCHW, sigma, *arguments, **conditions):
            sigmas.append(sigma.double())
            return super().forward(x_NCHW, sigma, *arguments, **conditions)

    images = sample(Keep(Counter(), precond, SHAPE), 1, 6, 0, sampler=sampler, **options)
    assert images.isfinite().all()
    levels = torch.cat(sigmas)
    assert (levels >= precond.sigma_min * (1 - 1e-6)).all()
    assert (levels <= precond.sigma_max * (1 + 1e-6)).all()
    torch.testing.assert_close(precond.round_sigma(levels), levels, rtol=1e-6, atol=0)


def test_range_of_an_outside_denoiser_is_unlimited():
    assert clip_range(gaussian, 0.002, 80.0) == (0.002, 80.0)
    assert clip_range(counting_model(VE()), 0.002, 800.0) == (0.02, 100.0)


def test_labels_choose_the_class_of_each_image():
    model, ids = counting_model(label_dim=4), torch.tensor([3, 0, 1])
    by_id = sample(model, 3, 2, 0, labels=ids, sampler="consistency")
    rows = nn.functional.one_hot(ids, 4).float()
    assert torch.equal(sample(model, 3, 2, 0, labels=rows, sampler="consistency"), by_id)
    torch.testing.assert_close(sample(model, 3, 2, 0, labels=3, sampler="consistency")[0], by_id[0])
    assert torch.equal(sample(model, 3, 2, 0, labels=ids, sampler="consistency", batch_size=2), by_id)


def test_classes_are_drawn_evenly_when_none_are_given():
    counts = choose_labels(None, torch.arange(40_000), 0, 4).bincount(minlength=4)
    assert ((counts - 10_000).abs() < 400).all()
    assert choose_labels(None, torch.arange(3), 0, 0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "num"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps: .*at least 1, got 0"),
        ({"steps": 0, "sampler": "consistency"}, "steps"),
        ({"sampler": "ddim"}, "ddim"),
        ({"mid_sigmas": (1.0,)}, "mid_sigmas: the heun sampler"),
        ({"eta": 0.5}, "eta: the heun sampler has no such option, it belongs to ancestral"),
        ({"sampler": "euler", "s_churn": 1.0}, "s_churn: the euler sampler has no such option, it belongs to heun and dpm"),
        ({"churn": 1.0}, "churn: the heun sampler has no such option, nor has any other"),
        ({"s_churn": -1.0}, "s_churn: .*-1.0"),
        ({"s_churn": math.nan}, "s_churn: .*nan"),
        ({"s_churn": 1.0, "s_noise": math.inf}, "s_noise: .*inf"),
        ({"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin <= s_tmax, got 2.0 and 1.0"),
        ({"sampler": "ancestral", "eta": 1.5}, "eta: .*1.5"),
        ({"sampler": "dpm", "midpoint_rho": 0.0}, "midpoint_rho: .*0.0"),
        ({"sampler": "consistency", "steps": 3, "mid_sigmas": (1.0,)}, "need 2 intermediate"),
        ({"sampler": "consistency", "steps": 3, "mid_sigmas": (1.0, 2.0)}, "descend"),
        ({"sampler": "consistency", "steps": 2, "mid_sigmas": (90.0,)}, "descend"),
        ({"labels": torch.tensor([0, 1])}, "each of 3 images"),
        ({"labels": torch.tensor([0, 1, 4])}, "0, 4"),
        ({"labels": -1}, "0, 4"),
    ],
)
def test_impossible_requests_say_why(change, message):
    request = {"num": 3, "steps": 2, "seed": 0} | change
    with pytest.raises(ConfigError, match=message):
        sample(counting_model(label_dim=4), **request)


def test_labels_for_a_model_without_classes_say_why():
    with pytest.raises(ConfigError, match="no classes"):
        sample(counting_model(), 2, 2, 0, labels=1)


@pytest.mark.parametrize("sample", [sample_heun, sample_dpm, sample_ancestral, sample_consistency])
def test_missing_noise_or_grid_says_why(sample):
    extra = {"s_churn": 1.0} if sample in (sample_heun, sample_dpm) else {}
    with pytest.raises(ConfigError, match="noise"):
        sample(gaussian, start(), karras_sigmas(3), **extra)
    with pytest.raises(ConfigError, match="final 0"):
        sample(gaussian, start(), torch.zeros(1))


@pytest.mark.parametrize("option", ["solver", "discretization", "schedule", "scaling"])
def test_an_unknown_choice_of_the_generalised_sampler_says_why(option):
    with pytest.raises(ConfigError, match=f"{option}.*other"):
        Ablation(**{option: "other"})


def test_the_command_line_and_the_function_offer_every_sampler_and_option():
    offered = next(option for option in sample_command.params if option.name == "sampler").type.choices
    (literal, _) = get_args(get_type_hints(sample)["sampler"])
    assert tuple(offered) == get_args(literal) == tuple(SAMPLERS)
    options = set().union(*(entry.options for entry in SAMPLERS.values()))
    assert options == set(SamplerOptions.__annotations__)
    assert options <= {option.name for option in sample_command.params}
    for entry in SAMPLERS.values():
        assert set(entry.options) <= set(inspect.signature(entry.run).parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 2.5}, "steps: expected a whole number"),
        ({"num": 2.0}, "num and batch_size must be whole numbers"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"seed": 2**40}, "seed: expected a whole number"),
        ({"rho": math.nan}, "rho: expected a finite number"),
        ({"rho": -7.0}, "rho: expected a finite number"),
        ({"sampler": "dpm", "midpoint_rho": 500.0}, "midpoint_rho: expected a number from 1 to 10"),
        ({"sampler": "dpm", "midpoint_rho": 1e-3}, "midpoint_rho: expected a number from 1 to 10"),
        ({"sampler": "heun", "s_churn": "a"}, "s_churn: expected a number"),
        ({"sampler": "heun", "s_noise": 1.003}, "s_noise: there is no churn without s_churn"),
        ({"sampler": "heun", "s_churn": 1.0, "s_noise": 1e30}, "s_noise: expected a finite number from 0 to 100"),
        ({"labels": torch.full((2, 4), math.nan)}, "labels: one-hot rows must be finite"),
    ],
)
def test_arguments_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sample(unet_model(label_dim=4), **{"num": 2, "steps": 3, **arguments})
