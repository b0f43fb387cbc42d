"""CTM on densities whose trajectories are known: a network replaced by the solution has nothing to learn."""

import math
from itertools import pairwise

import pytest
import torch
from golden_models import batch_of
from torch import nn

from fastcm.diffusion.trajectory import Trajectory
from fastcm.model import Model
from fastcm.objectives import CTM, Networks
from fastcm.random import Stream
from fastcm.sampling import sample_trajectory
from fastcm.train.ctm_step import CTMStep

SHAPE = (1, 2, 2)
OUTER = ("euler", "variance", "euler_variance_mixed")


class Gaussian:
    """N(mean, std^2) in every pixel: G = m + (x - m) sqrt((c^2 + s^2) / (c^2 + t^2))."""

    mean, std = 0.2, 0.6

    def denoise(self, x, t):
        return self.mean + self.std**2 / (self.std**2 + t**2) * (x - self.mean)

    def jump(self, x, t, s):
        return self.mean + ((self.std**2 + s**2) / (self.std**2 + t**2)).sqrt() * (x - self.mean)


class Mixture:
    """Three round Gaussians in the space of four pixels; the jump is a fine solution of the ODE in ln sigma."""

    means = torch.tensor([[0.8, 0.1, -0.5, 0.3], [-0.6, 0.7, 0.2, -0.4], [0.0, -0.9, 0.6, 0.5]], dtype=torch.float64)
    log_shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    std, steps = 0.35, 120

    def denoise(self, x, t):
        x, variance = x.flatten(1), (self.std**2 + t**2).flatten(1)
        square = (x[:, None] - self.means).square().sum(2)
        share = (self.log_shares - square / (2 * variance)).softmax(1)
        mean = share @ self.means
        return (mean + self.std**2 / variance * (x - mean)).reshape(-1, *SHAPE)

    def jump(self, x, t, s):
        step = (s.clamp(min=1e-6) / t).log() / self.steps

        def slope(x, level):
            return x - self.denoise(x, level)

        for i in range(self.steps):
            start, middle, end = (t * (step * (i + part)).exp() for part in (0, 0.5, 1))
            one = slope(x, start)
            two = slope(x + step / 2 * one, middle)
            three = slope(x + step / 2 * two, middle)
            x = x + step / 6 * (one + 2 * two + 2 * three + slope(x + step * three, end))
        return x


class Line(Mixture):
    """The mixture of two Gaussians on a line, for every pixel; order is kept, so F_s(G(x, t, s)) = F_t(x)."""

    places = torch.tensor([-0.7, 0.5], dtype=torch.float64)
    log_shares = torch.tensor([0.4, 0.6], dtype=torch.float64).log()

    def denoise(self, x, t):
        variance = self.std**2 + t**2
        share = (self.log_shares - (x[..., None] - self.places).square() / (2 * variance[..., None])).softmax(-1)
        mean = share @ self.places
        return mean + self.std**2 / variance * (x - mean)

    def distribution(self, x, t):
        scale = (2 * (self.std**2 + t**2)).sqrt()[..., None]
        return (self.log_shares.exp() * (1 + ((x[..., None] - self.places) / scale).erf()) / 2).sum(-1)


class Known(nn.Module):
    """The raw network F whose model makes exactly the density's jumps; ``off`` is an error of the jumped-to images."""

    def __init__(self, density, objective, second_time=True, off=0.0):
        super().__init__()
        self.density, self.objective, self.second_time = density, objective, second_time
        self.off = nn.Parameter(torch.tensor(off))
        self.head = nn.Conv2d(1, 1, 1)
        with torch.no_grad():
            self.head.weight.fill_(1)
            self.head.bias.fill_(0)

    def tail(self, cut):
        return self.head

    def trunk(self, x, c_noise, second, labels=None, cut="head"):
        t, s = ((4 * value.double()).exp() for value in (c_noise, second))
        c_skip, c_out, c_in, _ = (per_image(value) for value in self.objective.precond.scalings(t))
        t, s = per_image(t), per_image(s)
        x = x.double() / c_in
        g = self.g(x, t, s) + self.off
        return ((g - c_skip * x) / c_out).float()

    def g(self, x, t, s):
        """What the outer parametrisation makes the jump of; at s = t, where it says nothing, its limit."""
        if not self.second_time:
            return self.density.denoise(x, t)
        trajectory = self.objective.trajectory
        levels = t.flatten(), s.flatten()
        a, b = map(per_image, trajectory.coefficients(*levels))
        nothing = torch.zeros_like(x)
        limit = self.density.denoise(x, t) - trajectory.denoised(x, nothing, levels[0])
        equal = b.abs() < 1e-4
        return torch.where(equal, limit, (self.density.jump(x, t, s) - a * x) / b.where(~equal, torch.ones_like(b)))

    def forward(self, x, c_noise, labels=None, augment=None, dropout=None, second_N=None):
        return self.head(self.trunk(x, c_noise, c_noise if second_N is None else second_N))


def per_image(value_N):
    return value_N[:, None, None, None]


def model_of(density, objective, **options):
    return Model(Known(density, objective, **options), objective.precond, SHAPE, trajectory=objective.trajectory)


def networks_of(density, objective, off=0.0):
    """Student (with an error, if it is to have one), average and teacher."""
    frozen = [model_of(density, objective, second_time=second).requires_grad_(False) for second in (True, False)]
    return Networks(model_of(density, objective, off=off), *frozen)


def batch(num=16):
    index = torch.arange(num)
    return batch_of(0.6 * Stream(1, "images").image_normal(index, SHAPE))


def run(density, objective, num_steps, t_place, s_place, off=0.0):
    """Consistency loss of each image and the gradient's norm, for jumps from one place to another."""
    networks, images = networks_of(density, objective, off), batch()
    places = [torch.full((16,), float(place)) for place in (t_place, s_place)]
    jumps = objective.jumps_at(*places, num_steps)
    noise = Stream(2, "noise").image_normal(images.index, SHAPE)
    step = CTMStep(networks, objective, 0, 0, compiled=False)
    loss_N = step.accumulate(step.solved_microbatch(images, jumps, num_steps, noise, torch.ones(16), noise))
    return loss_N, torch.stack([p.grad.norm() for p in networks.student.net.head.parameters()]).norm()


DENSITIES = [Gaussian(), Mixture()]


@pytest.mark.parametrize("density", DENSITIES, ids=["gaussian", "mixture"])
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("estimate_level", ["s", "u"])
def test_the_solution_loses_nothing_and_has_no_gradient(density, outer, estimate_level):
    options = {"num_levels": 9, "max_solver_steps": 8, "distance": "squared", "dsm": "none"}
    options |= {"x_u": "self", "outer": outer, "estimate_level": estimate_level}  # x_u without an error of the solver
    objective, other = CTM(**options), CTM(**options, target_student=False)
    for places in ((0, 4), (2, 7), (1, 8)):
        loss_N, gradient = run(density, objective, 3, *places)
        assert loss_N.max() < 1e-10
        wrong_N, wrong_gradient = run(density, other, 3, *places, off=0.1)  # the student's error is not in the target
        assert wrong_N.min() > 1e-5
        assert gradient < 1e-3 * wrong_gradient


@pytest.mark.parametrize("density", DENSITIES, ids=["gaussian", "mixture"])
def test_the_loss_that_is_left_is_that_of_heuns_method_of_second_order(density):
    losses = []
    for factor in (1, 2, 4):  # ever finer grids between the same t, u and s
        levels = 8 * factor
        objective = CTM(num_levels=levels + 1, max_solver_steps=levels, distance="l2", dsm="none")
        losses.append(run(density, objective, 2 * factor, 2 * factor, 6 * factor)[0].mean().item())
    assert losses[-1] > 1e-5  # above rounding
    for coarse, fine in pairwise(losses):
        assert 3.5 < coarse / fine < 5.5


@pytest.mark.parametrize("density", DENSITIES, ids=["gaussian", "mixture"])
@pytest.mark.parametrize("outer", OUTER)
def test_the_denoiser_of_the_solution_is_the_densitys(density, outer):
    model = model_of(density, CTM(outer=outer))
    x = 2 * Stream(4, "x").image_normal(torch.arange(8), SHAPE)
    t = torch.tensor([0.01, 0.1, 0.5, 1, 3, 10, 40, 80])
    expected = density.denoise(x.double(), per_image(t.double()))
    torch.testing.assert_close(model(x, t).double(), expected, rtol=1e-4, atol=1e-4)
    fake = CTMStep(Networks(model), CTM(outer=outer, x_u="self"), 0, 0, compiled=False)
    noised = fake._noised(batch_of(x), t, torch.zeros_like(x))
    loss_N = fake._plain_denoising(
        fake._features([noised], [noised.scalings.c_noise], None), list(model.net.head.parameters()), noised, expected.float()
    )
    assert (loss_N / CTM().dsm_noise.weight(t)).max() < 1e-7


@pytest.mark.parametrize("density", DENSITIES, ids=["gaussian", "mixture"])
@pytest.mark.parametrize("outer", OUTER)
def test_jumps_of_the_solution_are_exact_up_to_both_limits(density, outer):
    model = model_of(density, CTM(outer=outer))
    x = Stream(4, "x").image_normal(torch.arange(4), SHAPE)
    for t in (80.0, 5.0, 0.3, 0.01):
        level = torch.full((4, 1, 1, 1), t, dtype=torch.float64)
        x_t = x * math.sqrt(0.36 + t**2)
        assert torch.equal(model.jump(x_t, t, t), x_t)
        for s in (0.7 * t, 0.05 * t, 0.002, 1e-4, 0.0):
            expected = density.jump(x_t.double(), level, torch.full_like(level, s))
            jumped = model.jump(x_t, t, s)
            # Below sigma_min the network is told sigma_min; "euler" then still has s in its own formula.
            tolerance = 1e-4 if s >= 0.002 else 4e-3
            torch.testing.assert_close(jumped.double(), expected, rtol=tolerance, atol=tolerance)
        nearly = model.jump(x_t, t, t * (1 - 1e-6))
        torch.testing.assert_close(nearly, x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_samples_of_the_mixture_keep_order_and_probability(gamma):
    density = Line()
    model = model_of(density, CTM())
    x = 80 * Stream(5, "latents").image_normal(torch.arange(200), SHAPE)

    def noise(number):
        return Stream(5, "noise").image_normal(torch.arange(200), SHAPE, number)

    images = sample_trajectory(model, x, torch.tensor([80.0, 2.0, 0.5, 0.002]), gamma=gamma, noise=noise)
    share = density.distribution(images, torch.full((1, 1, 1, 1), 0.002, dtype=torch.float64))
    if gamma == 0.0:
        expected = density.distribution(x.double(), torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64))
        torch.testing.assert_close(share, expected, rtol=0, atol=2e-3)
    # Uniform, by Kolmogorov and Smirnov's distance of 800 numbers: below 1.95 / sqrt(800) but once in a thousand.
    ordered = share.flatten().sort().values
    assert (ordered - torch.arange(0.5, 800) / 800).abs().max() < 1.95 / math.sqrt(800)


def test_a_trajectory_of_another_kind_would_be_noticed():
    objective = CTM(num_levels=9, max_solver_steps=8, distance="squared", dsm="none", x_u="self")
    student = model_of(Gaussian(), objective)
    student.trajectory = Trajectory("variance")
    x = Stream(4, "x").image_normal(torch.arange(4), SHAPE)
    expected = Gaussian().jump(x.double(), torch.tensor(2.0), torch.tensor(0.5))
    assert (student.jump(x, 2.0, 0.5) - expected).abs().max() > 0.01
