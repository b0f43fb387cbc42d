"""Jumps along known trajectories, gamma-sampling, and ``sample`` with models that jump."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM
from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import ConfigError
from fastcm.io.bundle import BundleHeader, load, save_bundle
from fastcm.io.images import to_uint8
from fastcm.model import Model, SamplingDefaults
from fastcm.nn import UNet
from fastcm.random import Stream
from fastcm.sampling import Guided, sample, sample_consistency, sample_euler, sample_heun, sample_trajectory

SHAPE = (3, 8, 8)
DEVIATION = 0.5
GRID = torch.tensor([80.0, 10.0, 1.0, 0.4, 0.1], dtype=torch.float64)


class Gaussian:
    """The exact jump of images with independent N(0, 0.5^2) pixels, and the levels it was asked for."""

    def __init__(self):
        self.calls = []

    def jump(self, x, t, s):
        self.calls.append((t[0].item(), s[0].item()))
        t, s = t[:, None, None, None].double(), s[:, None, None, None].double()
        return x.double() * ((DEVIATION**2 + s**2) / (DEVIATION**2 + t**2)).sqrt()


class JumpNet(nn.Module):
    """A network with a second time that depends on all it is given, and counts its evaluations and the images in them."""

    second_time = True

    def __init__(self):
        super().__init__()
        self.gain, self.sizes = nn.Parameter(torch.tensor(0.3)), []

    def forward(self, x, c_noise, labels=None, augment=None, dropout=None, second_N=None):
        self.sizes.append(len(x))
        shift = 0.2 * second_N + 0.1 * c_noise + (0 if labels is None else labels.argmax(1))
        return self.gain * x + shift[:, None, None, None]


def jump_model(label_dim=0, sampling=None):
    return Model(JumpNet(), EDM(), SHAPE, label_dim, sampling=sampling or SamplingDefaults("trajectory"))


def plain_model():
    net = UNet("ddpmpp", 8, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    return Model(net.init_weights(0), EDM(), SHAPE)


def start(num=3, sigma=80.0):
    return Stream(0, "latents").image_normal(torch.arange(num), SHAPE).double() * sigma


def noise_of(num):
    return lambda step: Stream(0, "sampler_noise").image_normal(torch.arange(num), SHAPE, draw=step)


noise = noise_of(3)


@pytest.mark.parametrize("grid", [GRID, GRID[[0, 4]], karras_sigmas(7)])
def test_deterministic_jumps_are_exact_on_any_grid(grid):
    expected = start() * math.sqrt((DEVIATION**2 + grid[-1].item() ** 2) / (DEVIATION**2 + 80.0**2))
    torch.testing.assert_close(sample_trajectory(Gaussian(), start(), grid), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_every_gamma_keeps_the_distribution(gamma, floor):
    x = start(400) * math.sqrt(1 + (DEVIATION / 80) ** 2)
    images = sample_trajectory(Gaussian(), x, GRID, gamma=gamma, noise=noise_of(400), sigma_min=floor)
    assert images.std().item() == pytest.approx(math.hypot(DEVIATION, 0.1), rel=0.01)
    assert images.mean().item() == pytest.approx(0, abs=0.01)


def test_gamma_decides_how_much_of_the_latent_is_kept():
    kept = []
    for gamma in (0.0, 0.3, 0.8, 1.0):
        images = sample_trajectory(Gaussian(), start(400), GRID, gamma=gamma, noise=noise_of(400), sigma_min=0.0)
        kept.append(torch.corrcoef(torch.stack((images.flatten(), start(400).flatten())))[0, 1].item())
    assert kept[0] == pytest.approx(1)
    assert kept == sorted(kept, reverse=True)
    # Each of three returns to a level keeps (c^2 + s^2) / (c^2 + sigma^2) of the variance.
    shares = [(DEVIATION**2 + (1 - 0.8**2) * level**2) / (DEVIATION**2 + level**2) for level in (10, 1, 0.4)]
    assert kept[2] == pytest.approx(math.sqrt(math.prod(shares)), abs=0.02)


@pytest.mark.parametrize(("floor", "s"), [(0.0, (6.0, 0.6, 0.24)), (0.5, (0.5 + 0.6 * 9.5, 0.5 + 0.6 * 0.5, 0.4))])
def test_jumps_go_below_the_next_level_and_the_last_one_to_its_level(floor, s):
    model = Gaussian()
    sample_trajectory(model, start(), GRID, gamma=0.8, noise=noise, sigma_min=floor)
    assert [t for t, _ in model.calls] == pytest.approx([80, 10, 1, 0.4])
    assert [to for _, to in model.calls] == pytest.approx([*s, 0.1])


def test_noise_leads_from_where_the_jump_ends_up_to_the_level():
    class Still(Gaussian):
        def jump(self, x, t, s):
            seen.append(x)
            return 0 * x

    seen = []
    sample_trajectory(Still(), start(), GRID, gamma=0.6, noise=noise, sigma_min=0.0)
    torch.testing.assert_close(seen[1], (0.6 * 10 * noise(1)).float())
    torch.testing.assert_close(seen[3], (0.6 * 0.4 * noise(3)).float())


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_gamma_one_is_consistency_sampling_from_the_same_floor(floor):
    model = jump_model()

    def denoiser(x, sigma):
        return model.jump(x, sigma, floor)

    levels = torch.tensor([80.0, 10.0, 1.0, floor], dtype=torch.float64)
    ours = sample_trajectory(model, start(), levels, gamma=1.0, noise=noise, sigma_min=floor)
    theirs = sample_consistency(denoiser, start(), levels, noise=noise, sigma_min=floor)
    torch.testing.assert_close(ours, theirs)


def test_smallest_level_of_the_model_is_the_default_floor():
    levels = torch.tensor([80.0, 10.0, 1.0], dtype=torch.float64)
    model = Model(JumpNet(), EDM(), SHAPE, trajectory=Trajectory(sigma_min=0.3))
    default, own, none = (
        sample_trajectory(model, start(), levels, gamma=0.9, noise=noise, **extra)
        for extra in ({}, {"sigma_min": 0.3}, {"sigma_min": 0.0})
    )
    assert torch.equal(default, own)
    assert not torch.allclose(default, none)


def test_callback_sees_every_jump():
    steps = []
    images = sample_trajectory(Gaussian(), start(), GRID, gamma=0.5, noise=noise, callback=steps.append)
    assert [step["i"] for step in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[0]["x"], start())
    assert torch.equal(steps[-1]["denoised"], images)


def test_noise_is_asked_for_between_jumps_only():
    asked = []
    sample_trajectory(Gaussian(), start(), GRID, gamma=0.5, noise=lambda jump: asked.append(jump) or noise(jump))
    assert asked == [1, 2, 3]
    sample_trajectory(Gaussian(), start(), GRID[:2], gamma=1.0)
    sample_trajectory(Gaussian(), start(), GRID)


@pytest.mark.parametrize("sampler", [sample_heun, sample_euler])
def test_ode_samplers_take_the_learned_score(sampler):
    """Euler's sampler is the chain of jumps of which g is held at s = t."""
    model = jump_model()
    images = sampler(model, start(), karras_sigmas(6))
    x = start()
    for t, s in zip(karras_sigmas(6)[:-1], karras_sigmas(6)[1:], strict=True):
        x = s / t * x + (1 - s / t) * model(x.float(), t.float()).double()
    (torch.testing.assert_close if sampler is sample_euler else _far)(images, x)


def _far(images, x):
    assert images.isfinite().all()
    assert (images - x).abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("label_dim", [0, 4])
def test_images_are_the_same_at_any_batch_size(gamma, label_dim):
    model = jump_model(label_dim)
    together = sample(model, 6, 3, 1, gamma=gamma)
    assert together.shape == (6, *SHAPE)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    apart = sample(model, 6, 3, 1, gamma=gamma, batch_size=4)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)
    chosen = sample(model, 2, 3, 1, gamma=gamma, index_offset=torch.tensor([5, 2]))
    torch.testing.assert_close(chosen, together[[5, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (4, 4), (None, 2)])
def test_every_step_is_one_evaluation(steps, evaluations):
    model = jump_model()
    sample(model, 5, steps, batch_size=3)
    assert model.net.sizes == [3] * evaluations + [2] * evaluations


def test_grid_is_that_of_karras_down_to_sigma_min():
    model = jump_model()
    x = start(2)
    expected = sample_trajectory(model, x, karras_sigmas(5)[:-1])
    torch.testing.assert_close(sample(model, 2, 4).double(), expected, rtol=1e-5, atol=1e-5)
    expected = sample_trajectory(model, x, torch.tensor([80.0, 5.0, 0.002], dtype=torch.float64))
    torch.testing.assert_close(sample(model, 2, 2, mid_sigmas=[5.0]).double(), expected, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_the_model():
    model = jump_model(sampling=SamplingDefaults("trajectory", (5.0, 1.0), steps=3, gamma=0.7))
    given = sample(jump_model(), 2, 3, sampler="trajectory", mid_sigmas=(5.0, 1.0), gamma=0.7)
    assert torch.equal(sample(model, 2), given)
    assert not torch.allclose(sample(model, 2, gamma=0.0), given)
    assert not torch.allclose(sample(model, 2, sampler="heun"), given)
    four = sample(jump_model(), 2, 4, gamma=0.7)
    assert torch.equal(sample(model, 2, 4), four)


def test_labels_choose_the_class():
    model, ids = jump_model(4), torch.tensor([3, 0, 1])
    images = sample(model, 3, 2, labels=ids)
    torch.testing.assert_close(sample(model, 3, 2, labels=nn.functional.one_hot(ids, 4).float()), images)
    torch.testing.assert_close(sample(model, 3, 2, labels=0)[1], images[1])
    assert not torch.isclose(sample(model, 3, 2, labels=0)[0], images[0]).all()


def test_jumps_never_wait_for_the_device():
    assert sample(jump_model(4).to("meta"), 5, 3, gamma=0.5, batch_size=2).is_meta


@pytest.mark.parametrize("levels", [(80.0, 1.0, 2.0), (80.0, 80.0, 1.0), (80.0, math.nan, 1.0), (math.inf, 1.0), (80.0, -1.0)])
def test_grids_that_do_not_descend_say_why(levels):
    with pytest.raises(ConfigError, match="sigmas: noise levels must descend"):
        sample_trajectory(Gaussian(), start(), torch.tensor(levels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"sigma_min": -1.0}, "sigma_min"),
        ({"gamma": 0.5, "noise": None}, "noise: this sampler adds"),
        ({"sigmas": GRID[:1]}, "final 0"),
        ({"model": plain_model()}, "second time"),
        ({"model": lambda x, sigma: x}, "second time"),
    ],
)
def test_impossible_jumps_say_why(change, message):
    request = {"model": Gaussian(), "x": start(), "sigmas": GRID, "noise": noise} | change
    with pytest.raises(ConfigError, match=message):
        sample_trajectory(**request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 2.0}, "gamma: expected 0"),
        ({"gamma": 0.5, "sampler": "heun"}, "gamma: the heun sampler has no such option, it belongs to trajectory"),
        ({"steps": 0}, "steps: .*at least 1, got 0"),
        ({"steps": 2, "mid_sigmas": (1.0, 0.5)}, "need 1 intermediate"),
        ({"steps": 2, "mid_sigmas": (90.0,)}, "descend"),
        ({"steps": 2, "mid_sigmas": (0.001,)}, "descend"),
        ({"index_offset": torch.arange(2)}, "each of 3 images"),
    ],
)
def test_impossible_requests_say_why(change, message):
    with pytest.raises(ConfigError, match=message):
        sample(jump_model(), 3, **change)


def test_models_that_cannot_jump_say_why():
    model = plain_model()
    with pytest.raises(ConfigError, match="second time"):
        sample(model, 1, sampler="trajectory")
    with pytest.raises(ConfigError, match="second time"):
        sample(Guided(jump_model(), plain_model(), 2.0), 1)


@pytest.fixture
def bundle(tmp_path):
    net = UNet("ddpmpp", 8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), second_time=True)
    state = net.init_weights(1).state_dict()
    state = {name: value + 0.05 * torch.sin(torch.arange(value.numel())).reshape(value.shape) for name, value in state.items()}
    network = {"family": "ddpmpp", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    header = BundleHeader(
        network=network | {"second_time": True},
        image_shape=(1, 8, 8),
        label_dim=0,
        augment_dim=0,
        preconditioner={"kind": "edm"},
        sampling=SamplingDefaults("trajectory", gamma=0.2),
        emas=("main",),
        trained={"phase": "jumps", "images": 1, "data": "digits"},
    )
    path = tmp_path / "model.safetensors"
    save_bundle(path, header, state, {"main": {name: 0.9 * value for name, value in state.items()}})
    return path


@pytest.mark.parametrize("options", [{"gamma": 0.9}, {"sampler": "heun"}])
def test_command_line_samples_by_jumps(fastcm_cli, tmp_path, bundle, options):
    model = load(bundle)
    assert model.sampling == SamplingDefaults("trajectory", gamma=0.2)
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = fastcm_cli("sample", bundle, "--num", 2, "--steps", 3, "--out", "out.npz", *flags)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        difference = file["images"].astype(int) - to_uint8(sample(model, 2, 3, **options))
    assert abs(difference).max() <= 1


def test_command_line_says_what_is_wrong_with_gamma(fastcm_cli, bundle):
    done = fastcm_cli("sample", bundle, "--gamma", 3)
    assert done.returncode == 2
    assert "gamma: expected 0" in done.stderr
