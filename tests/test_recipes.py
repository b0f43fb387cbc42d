"""The shipped recipes against what their papers state: iterations, decays a step, grids and constants."""

import math

import pytest

from fastcm.config import load_config
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.train.build import build_objective
from fastcm.train.schedules import ema_beta, learning_rate


def recipe(name):
    """(configuration, its only phase, the phase's objective)."""
    config = load_config(name)
    (phase,) = config.phases.values()
    return config, phase, build_objective(phase.objective)


def iterations(phase):
    return phase.duration_images / phase.batch_size


def decay(phase, ema="main"):
    return ema_beta(phase.emas[ema], phase.duration_images, phase.batch_size)


def optimizer(phase):
    return phase.optimizer.kind, phase.optimizer.lr, phase.optimizer.betas, phase.optimizer.warmup_images


def target_decay(phase, objective, images=0):
    return 0.5 ** (phase.batch_size / objective.target_halflife(images))


@pytest.mark.parametrize(
    ("name", "channels", "lr", "dropout"),
    [
        ("ect_imagenet64", 192, 1e-3, 0.40),
        ("ect_imagenet64_m", 256, 9e-4, 0.50),
        ("ect_imagenet64_l", 320, 8e-4, 0.50),
        ("ect_imagenet64_xl", 384, 7e-4, 0.50),
    ],
)
def test_ect_on_edm2(name, channels, lr, dropout):
    """arXiv 2406.14548, ImageNet-64."""
    config, phase, objective = recipe(name)
    assert config.network.model_channels == channels
    assert (config.network.family, config.network.logvar_channels) == ("edm2", 0)
    assert (phase.batch_size, iterations(phase)) == (128, 100_000)
    assert optimizer(phase) == ("adam", lr, (0.9, 0.99), 0)
    assert learning_rate(phase.optimizer, 4 * 2000 * 128, phase.duration_images) == pytest.approx(lr / 2)
    assert (phase.dropout, phase.dropout_max_resolution, phase.augment) == (dropout, 16, 0)
    assert (objective.p_mean, objective.p_std, objective.k, objective.b) == (-0.8, 1.6, 8, 1)
    assert (objective.distance, objective.c, objective.weight, objective.mapping) == ("pseudo_huber", 0.06, "edm", "sigmoid")
    assert [objective.schedule(stage * 3_200_000)["decay"] for stage in range(4)] == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert sorted(ema.std for ema in phase.emas.values() if ema.kind == "power") == [0.01, 0.05, 0.10]
    assert decay(phase, "classic") == pytest.approx(0.9999, abs=1e-8)
    assert phase.objective.mid_sigmas == (1.526,)


def test_cd_on_cifar10():
    """arXiv 2303.01469, Table 3."""
    config, phase, objective = recipe("cd_cifar10")
    assert config.network.family == "ncsnpp"
    assert (phase.batch_size, iterations(phase), phase.dropout) == (512, 800_000, 0)
    assert optimizer(phase) == ("radam", 4e-4, (0.9, 0.999), 10_000_000)
    assert decay(phase) == pytest.approx(0.9999, abs=1e-8)
    assert objective.schedule(0) == objective.schedule(phase.duration_images) == {"num_levels": 18}
    assert (objective.solver, objective.distance, objective.weight) == ("heun", "lpips", "uniform")
    assert objective.target_halflife(0) is None


def test_cd_on_imagenet():
    """arXiv 2303.01469, Table 3."""
    config, phase, objective = recipe("cd_imagenet64")
    assert config.data.conditional
    assert (phase.batch_size, iterations(phase), phase.dropout) == (2048, 600_000, 0)
    assert optimizer(phase) == ("radam", 8e-6, (0.9, 0.999), 0)
    assert decay(phase) == pytest.approx(0.9999432, abs=1e-8)
    assert objective.schedule(0) == {"num_levels": 40}
    assert (objective.solver, objective.distance, objective.weight) == ("heun", "lpips", "uniform")
    assert target_decay(phase, objective) == pytest.approx(0.95, abs=1e-6)
    assert phase.objective.mid_sigmas[0] == pytest.approx(karras_sigmas(40)[22].item(), rel=3e-3)


def test_ct_on_cifar10():
    """arXiv 2303.01469, Table 3 and Appendix C."""
    _, phase, objective = recipe("ct_cifar10")
    assert (phase.batch_size, iterations(phase), phase.dropout) == (512, 800_000, 0)
    assert optimizer(phase) == ("radam", 4e-4, (0.9, 0.999), 10_000_000)
    assert decay(phase) == pytest.approx(0.9999, abs=1e-8)
    assert objective.schedule(phase.duration_images) == {"num_levels": 151}
    assert objective.schedule(0) == {"num_levels": 2}
    assert (objective.solver, objective.distance, objective.weight) == ("none", "lpips", "uniform")
    # mu = exp(s0 ln mu0 / N'), where N' is 150 intervals at the end
    expected = math.exp(2 * math.log(0.9) / 150)
    assert target_decay(phase, objective, phase.duration_images) == pytest.approx(expected, abs=1e-7)


def test_ict_on_cifar10():
    """arXiv 2310.14189, Table 1 and section 4."""
    config, phase, objective = recipe("ict_cifar10")
    assert (config.network.family, config.network.fourier_scale) == ("ncsnpp", 0.02)
    assert (phase.batch_size, iterations(phase), phase.dropout) == (1024, 400_000, 0.3)
    assert optimizer(phase) == ("radam", 1e-4, (0.9, 0.999), 0)
    assert decay(phase) == pytest.approx(0.99993, abs=1e-8)
    levels = [objective.schedule(images)["num_levels"] for images in range(0, phase.duration_images, 51_200_000)]
    assert levels == [10 * 2**i + 1 for i in range(8)]
    assert (objective.indices, objective.p_mean, objective.p_std) == ("lognormal", -1.1, 2.0)
    assert (objective.distance, objective.weight, objective.solver) == ("pseudo_huber", "inverse_gap", "none")
    assert objective.c == pytest.approx(0.00054 * math.sqrt(3 * 32 * 32), rel=3e-3)
    assert objective.target_halflife(0) is None
    assert phase.objective.mid_sigmas == (0.821,)
