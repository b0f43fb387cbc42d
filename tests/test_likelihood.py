"""Bits per dimension of densities that are known: Gaussians and a mixture, with their exact denoisers."""

import builtins
import math

import pytest
import torch

from fastcm.diffusion.preconditioners import EDM, VE
from fastcm.errors import CheckpointError, ConfigError, DataError
from fastcm.model import Model, SamplingDefaults
from fastcm.nn import UNet
from fastcm.random import Stream
from fastcm.sampling.dequantize import dequantized
from fastcm.sampling.likelihood import bits_per_dim, draw_probes
from fastcm.sampling.likelihood_ode import slope_and_divergence

SHAPE, DIMS = (3, 2, 2), 12
CLOSE = 0.01  # bits/dim
CONTINUOUS = {"dequantize": "none", "levels": None}


class Mixture:
    """The exact denoiser and density of a mixture of Gaussians, given as (weight, mean [d], covariance [d, d])."""

    image_shape = SHAPE

    def __init__(self, *parts, label_dim=0):
        self.parts, self.label_dim = (
            [(weight, mean.double(), covariance.double()) for weight, mean, covariance in parts],
            label_dim,
        )

    def log_parts(self, x, sigma):
        """log(weight N(x; mean, covariance + sigma^2 I)) by part, and the rows (x - mean) (covariance + sigma^2 I)^-1."""
        logs, rows = [], []
        for weight, mean, covariance in self.parts:
            total = covariance + sigma**2 * torch.eye(DIMS, dtype=torch.float64)
            row = torch.linalg.solve(total, (x - mean).T).T
            logs.append(math.log(weight) - 0.5 * (((x - mean) * row).sum(1) + torch.logdet(2 * math.pi * total)))
            rows.append(row)
        return torch.stack(logs), torch.stack(rows)

    def bits(self, images, sigma=0.0):
        return -self.log_parts(images.double().flatten(1), sigma)[0].logsumexp(0) / (DIMS * math.log(2))

    def __call__(self, x, sigma, labels=None):
        x, sigma = x.double().flatten(1), sigma[0].double()
        shift = 0 if labels is None else 0.1 * labels[:, None].double()
        logs, rows = self.log_parts(x - shift, sigma)
        score = -(logs.softmax(0)[..., None] * rows).sum(0)
        return (x + sigma**2 * score).reshape(-1, *SHAPE)

    def samples(self, num):
        """Images, the parts in turn."""
        z = Stream(0, "toy").normal(torch.arange(num), (DIMS,)).double()
        rows = []
        for i in range(num):
            _, mean, covariance = self.parts[i % len(self.parts)]
            rows.append(mean + torch.linalg.cholesky(covariance) @ z[i])
        return torch.stack(rows).reshape(num, *SHAPE)


def covariance_of(deviations, purpose):
    """A full covariance with these principal deviations."""
    basis = torch.linalg.qr(Stream(0, purpose).normal(torch.arange(DIMS), (DIMS,)).double()).Q
    return basis @ torch.diag(torch.as_tensor(deviations, dtype=torch.float64) ** 2) @ basis.T


MEAN = torch.linspace(-0.2, 0.2, DIMS)
INDEPENDENT = Mixture((1.0, MEAN, 0.15**2 * torch.eye(DIMS)))
CORRELATED = Mixture((1.0, MEAN, covariance_of(torch.logspace(-2, -0.6, DIMS), "a")))
TWO = Mixture((0.3, MEAN, covariance_of([0.05] * 6 + [0.2] * 6, "b")), (0.7, -MEAN, covariance_of([0.03, 0.1] * 6, "c")))


def unet_model(**options):
    net = UNet("ddpmpp", 8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    state = net.init_weights(0).state_dict()
    state = {name: value + 0.02 * torch.sin(torch.arange(value.numel())).reshape(value.shape) for name, value in state.items()}
    net.load_state_dict(state)
    return Model(net, EDM(), (1, 8, 8), **options)


def digits(num):
    return (Stream(0, "toy").integers(torch.arange(num), 17, (1, 8, 8)) / 8 - 1).float()


@pytest.mark.parametrize("probe", ["exact", "rademacher"])
def test_independent_gaussian(probe):
    images = INDEPENDENT.samples(64)
    found = bits_per_dim(INDEPENDENT, images, probe=probe, **CONTINUOUS)
    # signs give the trace of a diagonal matrix without an error
    assert (found.bpd - INDEPENDENT.bits(images)).abs().max() < CLOSE
    assert found.mean == pytest.approx(INDEPENDENT.bits(images).mean().item(), abs=CLOSE / 5)


def test_corrected_residual_is_a_bound_and_the_official_one_is_far_below():
    images = INDEPENDENT.samples(5000)
    options = {"batch_size": 5000, **CONTINUOUS}
    kinds = ("none", "corrected", "official")
    none, corrected, official = (bits_per_dim(INDEPENDENT, images, residual=kind, **options).mean for kind in kinds)
    assert corrected == pytest.approx(none, abs=0.02)  # four standard errors of the noise that it draws
    sigma = 0.002 ** (1 / 7)
    # E |x0 - D|^2 = d sigma^2 c^2 / (sigma^2 + c^2)
    expected = 0.5 * (0.15**2 / (0.15**2 + sigma**2) - 1) / math.log(2)
    assert official - none == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("model", [CORRELATED, TWO], ids=["correlated", "mixture"])
def test_full_covariance(model):
    images = model.samples(24)
    truth = model.bits(images, 0.002)
    exact = bits_per_dim(model, images, probe="exact", **CONTINUOUS)
    assert (exact.bpd - truth).abs().max() < CLOSE
    assert exact.probe_standard_error == 0
    for probe in ("rademacher", "gaussian"):
        found = bits_per_dim(model, images, probe=probe, probes=64, **CONTINUOUS)
        assert found.probe_standard_error < 0.08
        assert abs(found.mean - truth.mean().item()) < 4 * found.probe_standard_error


def test_more_probes_lower_the_error_like_one_over_the_root():
    images = CORRELATED.samples(16)
    exact = bits_per_dim(CORRELATED, images, probe="exact", **CONTINUOUS).bpd
    few, many = (bits_per_dim(CORRELATED, images, probe="gaussian", probes=num, **CONTINUOUS) for num in (8, 128))
    assert few.probe_standard_error / many.probe_standard_error == pytest.approx(4, rel=0.25)
    errors = [(one.bpd - exact).square().mean().sqrt() for one in (few, many)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.5)
    low, high = many.probe_interval
    assert high - low == pytest.approx(2 * 1.96 * many.probe_standard_error, rel=1e-3)
    assert bits_per_dim(CORRELATED, images[:1], **CONTINUOUS).probe_interval is None


def test_error_over_images_is_the_standard_error():
    images = INDEPENDENT.samples(50)
    found = bits_per_dim(INDEPENDENT, images, **CONTINUOUS)
    assert found.standard_error == pytest.approx((found.bpd.std() / 50**0.5).item())
    low, high = found.interval
    assert low < found.mean < high
    assert bits_per_dim(INDEPENDENT, images[:1], **CONTINUOUS).interval is None


def test_tighter_tolerance_is_nearer_to_the_truth_and_costs_more():
    images = TWO.samples(8)
    # at this sigma_max the prior has no error of its own
    options = {"probe": "exact", "sigma_max": 2000.0, **CONTINUOUS}
    runs = [bits_per_dim(TWO, images, rtol=tol, atol=tol, **options) for tol in (1e-1, 1e-3, 1e-5)]
    errors = [(run.bpd - TWO.bits(images, 0.002)).abs().max().item() for run in runs]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-4
    assert runs[0].mean_evaluations < runs[1].mean_evaluations < runs[2].mean_evaluations
    assert runs[1].mean_evaluations < 120


def test_evaluations_are_counted():
    calls = []

    def model(x, sigma):
        calls.append(sigma[0].item())
        return INDEPENDENT(x, sigma)

    found = bits_per_dim(model, INDEPENDENT.samples(6), batch_size=4, **CONTINUOUS)
    assert found.evaluations_N[0] + found.evaluations_N[5] == len(calls)
    assert found.evaluations_N.tolist() == [found.evaluations_N[0]] * 4 + [found.evaluations_N[5]] * 2
    assert min(calls) == pytest.approx(0.002)
    assert max(calls) <= 80 * (1 + 1e-6)  # the solver never looks beyond the model's range


def test_result_does_not_depend_on_the_batch():
    model, images = unet_model(), digits(3)
    options = {"levels": 17, "seed": 3, "rtol": 3e-3, "atol": 3e-3}
    whole = bits_per_dim(model, images, **options)
    parts = bits_per_dim(model, images, batch_size=2, **options)
    alone = bits_per_dim(model, images[2:], index=torch.tensor([2]), **options)
    assert (whole.bpd - parts.bpd).abs().max() < 5e-3
    assert torch.equal(parts.bpd[2:], alone.bpd)  # the same batch: the same steps
    other = bits_per_dim(model, images, **{**options, "seed": 4})
    assert (whole.bpd - other.bpd).abs().max() > 0.01


def test_mean_of_probes_is_what_each_gives_alone():
    model, images = unet_model(), digits(2)
    both = bits_per_dim(model, images, levels=17, probes=2)
    assert (both.bpd_KN[0] - both.bpd_KN[1]).abs().min() > 1e-4
    assert (both.bpd_KN[:1] - bits_per_dim(model, images, levels=17).bpd_KN).abs().max() < 2e-3
    torch.testing.assert_close(both.bpd, both.bpd_KN.mean(0))


def test_trace_of_a_network_is_that_of_its_jacobian():
    model, x = unet_model(), digits(2)
    jacobian = torch.autograd.functional.jacobian(lambda one: model(one[None], 0.7)[0].flatten(), x[0]).reshape(64, 64)
    level = torch.tensor(0.7)
    slope, divergence = slope_and_divergence(model, x, level)
    assert divergence[0, 0].item() == pytest.approx(64 - jacobian.trace().item(), rel=1e-4)
    torch.testing.assert_close(slope.float(), x - model(x, 0.7))
    probes = draw_probes("gaussian", 3, 0, torch.arange(2), (1, 8, 8))
    _, estimates = slope_and_divergence(model, x, level, probes_KNCHW=probes)
    v = probes[1, 0].flatten()
    assert estimates[1, 0].item() == pytest.approx(64 - (v @ jacobian @ v).item(), rel=1e-4)


def test_probes_have_unit_covariance():
    index = torch.arange(2000)
    for kind in ("rademacher", "gaussian"):
        flat = draw_probes(kind, 2, 0, index, (2, 1, 1)).reshape(-1, 2)
        torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(2), rtol=0, atol=0.06)
    assert set(draw_probes("rademacher", 1, 0, index, SHAPE).unique().tolist()) == {-1.0, 1.0}


def test_class_conditional_density():
    model = Mixture((1.0, MEAN, 0.1**2 * torch.eye(DIMS)), label_dim=3)
    images, labels = model.samples(6), torch.arange(6) % 3
    shifted = images + 0.1 * labels[:, None, None, None]
    right = bits_per_dim(model, shifted, labels=labels, batch_size=4, **CONTINUOUS)
    assert (right.bpd - model.bits(images, 0.002)).abs().max() < CLOSE
    assert bits_per_dim(model, shifted, labels=0, **CONTINUOUS).mean > right.mean + 0.1


def test_uniform_noise_bounds_the_probability_of_discrete_images():
    deviation, levels = 0.15, 65
    images = (INDEPENDENT.samples(200) * 32).round() / 32
    found = bits_per_dim(INDEPENDENT, images, levels=levels, batch_size=200)
    normal = torch.distributions.Normal(MEAN.double(), deviation)
    edges = [normal.cdf(images.double().flatten(1) + half) for half in (-1 / 64, 1 / 64)]
    truth = -(edges[1] - edges[0]).log2().mean().item()
    assert found.offset_bits == pytest.approx(5)
    assert found.mean == pytest.approx(truth, abs=CLOSE)
    assert bits_per_dim(INDEPENDENT, images, dequantize="none", levels=256, batch_size=200).offset_bits == 7


def test_truncated_normal_noise_stays_in_its_bin_and_has_the_entropy_of_its_samples():
    images, index = digits(200), torch.arange(200)
    wide = dequantized(images, "truncated_normal", 17, 100.0, 0, index)
    uniform = dequantized(images, "uniform", 17, 100.0, 0, index)
    torch.testing.assert_close(wide.images_NCHW, uniform.images_NCHW)  # far wider than the bin: uniform on it
    assert wide.offset_bits == pytest.approx(uniform.offset_bits, abs=1e-6)
    assert uniform.offset_bits == 3
    sigma = 0.05
    cut = dequantized(images, "truncated_normal", 17, sigma, 0, index)
    noise = cut.images_NCHW - images
    assert noise.abs().max() <= 1 / 16
    inside = math.erf(1 / 16 / sigma / math.sqrt(2))
    minus_log_q = 0.5 * (noise / sigma) ** 2 + math.log(math.sqrt(2 * math.pi) * sigma * inside)
    assert cut.offset_bits == pytest.approx(-minus_log_q.mean().item() / math.log(2), abs=0.01)


def test_levels_kept_in_eight_bits_are_restored():
    stored = ((digits(3) + 1) * 127.5).round() / 127.5 - 1
    a, b = (dequantized(images, "uniform", 17, 0.002, 0, torch.arange(3)) for images in (stored, digits(3)))
    torch.testing.assert_close(a.images_NCHW, b.images_NCHW)


def test_noise_range_is_the_models_own():
    model = Model(unet_model().net, VE(), (1, 8, 8))
    found = bits_per_dim(model, digits(1), levels=17, rtol=0.1, atol=0.1)
    assert (found.settings.sigma_min, found.settings.sigma_max) == (0.02, 80.0)
    with pytest.raises(ConfigError, match=r"defined from 0\.02 to 100 only"):
        bits_per_dim(model, digits(1), levels=17, sigma_min=0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "sign"}, "probe: expected"),
        ({"probes": 0}, "probes"),
        ({"residual": "both"}, "residual: expected"),
        ({"residual": "official", "dequantize": "truncated_normal"}, "bound by itself"),
        ({"dequantize": "gaussian"}, "dequantize: expected"),
        ({"levels": 1}, "levels"),
        ({"levels": None}, "levels"),
        ({"rtol": 0.0}, "rtol"),
        ({"atol": math.nan}, "atol"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max"),
        ({"labels": 1}, "no classes"),
        ({"index": torch.arange(3)}, "index"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        bits_per_dim(unet_model(), digits(2), **{"levels": 17, **options})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 1, 8, 8), 1.5), "expected values in"),
        (torch.full((1, 1, 8, 8), math.nan), "expected values in"),
        (torch.zeros(1, 3, 8, 8), r"\[N, 1, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), "at least one"),
        (torch.full((1, 1, 8, 8), 0.3), "not on 17 levels"),
    ],
)
def test_images_that_cannot_be_used(images, message):
    with pytest.raises(DataError, match=message):
        bits_per_dim(unet_model(), images, levels=17)


def test_model_that_is_not_finite_or_has_no_score_is_refused():
    broken = unet_model()
    next(broken.net.parameters()).data.fill_(math.nan)
    with pytest.raises(CheckpointError, match=r"not finite at sigma 0\.002"):
        bits_per_dim(broken, digits(1), levels=17)
    with pytest.raises(ConfigError, match="consistency model"):
        bits_per_dim(unet_model(sampling=SamplingDefaults("consistency")), digits(1), levels=17)
    with pytest.raises(ConfigError, match="no gradient"):
        bits_per_dim(torch.no_grad()(INDEPENDENT.__call__), INDEPENDENT.samples(1), **CONTINUOUS)
    with pytest.raises(ConfigError, match="3 classes"):
        bits_per_dim(Mixture((1.0, MEAN, torch.eye(DIMS)), label_dim=3), torch.zeros(1, *SHAPE), **CONTINUOUS)


def test_tolerance_below_the_networks_rounding_is_refused(monkeypatch):
    monkeypatch.setattr("fastcm.sampling.likelihood_ode.MAX_SOLVER_STEPS", 30)
    with pytest.raises(ConfigError, match="cannot be met"):
        bits_per_dim(unet_model(), digits(1), levels=17, rtol=1e-12, atol=1e-12)


def test_missing_solver_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install fastcm\[likelihood\]"):
        bits_per_dim(INDEPENDENT, INDEPENDENT.samples(1), **CONTINUOUS)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    model, images = unet_model(), digits(3)
    options = {"levels": 17, "probes": 2, "residual": "corrected"}
    cpu = bits_per_dim(model, images, **options)
    gpu = bits_per_dim(model.cuda(), images, **options)
    assert gpu.bpd.device.type == "cuda"
    assert (gpu.bpd_KN.cpu() - cpu.bpd_KN).abs().max() < 5e-3
