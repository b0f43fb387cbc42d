"""Post-hoc EMA: its mathematics, and its numbers against the official implementation."""

import numpy as np
import pytest
import torch
from golden_cases import load_case

from fastcm.config import EMAConfig, OptimizerConfig
from fastcm.train.posthoc_ema import averaging_kernel, kernel_mismatch, kernel_products, posthoc_coefficients
from fastcm.train.schedules import ema_beta, learning_rate, power_gamma, power_std


def fp64(*values):
    return np.array(values, dtype=np.float64)


@pytest.fixture(scope="module")
def golden():
    return load_case("G_phema_math")


@pytest.fixture(scope="module")
def stored(golden):
    """Images and widths of the stored averages of the golden case."""
    return [golden.tensors[f"in/{name}"].numpy() for name in ("in_ofs", "in_std")]


def test_golden_width_and_exponent_both_ways(golden):
    golden.close(torch.from_numpy(fp64(*map(power_gamma, golden.tensors["in/std"].tolist()))), "out/exp")
    golden.close(torch.from_numpy(fp64(*map(power_std, golden.tensors["in/exp"].tolist()))), "out/std")


def test_golden_decay_of_a_step(golden):
    steps = list(zip(golden.tensors["in/t_next"].tolist(), golden.tensors["in/t_delta"].tolist(), strict=True))
    configs = [EMAConfig(kind="power", std=std) for std in golden.tensors["in/std"].tolist()]
    betas = [[ema_beta(config, int(after - size), int(size)) for after, size in steps] for config in configs]
    golden.close(torch.tensor(betas, dtype=torch.float64), "out/beta")


def test_golden_kernel_products(golden, stored):
    golden.close(torch.from_numpy(kernel_products(*stored, *stored)), "out/corr")


@pytest.mark.parametrize(
    ("images", "std", "name"),
    [((8e6, 8e6, 8e6), (0.03, 0.075, 0.15), "out/coeffs"), ((5.6e6, 8e6), (0.03, 0.075), "out/coeffs2")],
)
def test_golden_coefficients(golden, stored, images, std, name):
    coefficients_ST = posthoc_coefficients(*stored, fp64(*images), fp64(*std))
    golden.close(torch.from_numpy(coefficients_ST), name)
    assert coefficients_ST.sum(0) == pytest.approx(1.0, abs=1e-12)


def test_golden_averaging_kernel(golden):
    kernels = [averaging_kernel(20, 0.1, 64), averaging_kernel(50, 0.05, 64)]
    golden.close(torch.from_numpy(np.stack(kernels, axis=1)), "out/response")


def test_golden_learning_rate(golden):
    config = OptimizerConfig(lr=0.01, warmup_images=10_000_000, decay_images=70_000 * 2048)
    rates = [learning_rate(config, int(images), 2**40) for images in golden.tensors["in/lr_nimg"].tolist()]
    golden.close(torch.tensor(rates, dtype=torch.float64), "out/lr")


def test_learning_rate_decays_as_the_inverse_root_and_still_cools_down():
    config = OptimizerConfig(lr=2.0, decay_images=100, cooldown_images=400)
    rates = [learning_rate(config, images, 1600) for images in (0, 50, 100, 400, 900, 1400, 1600)]
    assert rates == pytest.approx([2.0, 2.0, 2.0, 1.0, 2 / 3, 2 / 14**0.5 / 2, 0.0])


def tracked(config, weights, size, first=0):
    """The average of each row of weights, of which one comes every ``size`` images after the first ones."""
    average, all_of_them = np.zeros_like(weights[0]), []
    for number, row in enumerate(weights):
        beta = ema_beta(config, first + number * size, size)
        average = row + beta * (average - row)
        all_of_them.append(average)
    return np.stack(all_of_them)


@pytest.fixture(scope="module")
def trajectory():
    return load_case("G_phema_trajectory")


def test_golden_trajectory_of_averages_and_what_is_rebuilt_from_them(trajectory):
    weights, size = trajectory.tensors["in/weights"].numpy(), trajectory.config["batch_size"]
    images = trajectory.tensors["in/snap_nimg"].double().numpy()
    widths = trajectory.tensors["in/snap_std"].numpy()
    followed = {std: tracked(EMAConfig(kind="power", std=std), weights, size) for std in trajectory.config["stds"]}
    rows = [followed[std][int(n) // size - 1] for n, std in zip(images, widths, strict=True)]
    trajectory.close(torch.from_numpy(np.stack(rows)), "mid/snapshots")
    for std in trajectory.config["out_stds"]:
        coefficients_ST = posthoc_coefficients(images, widths, images[-1:], fp64(std))
        trajectory.close(torch.from_numpy((coefficients_ST.T @ np.stack(rows))[0]), f"out/posthoc_{std}")
        direct = tracked(EMAConfig(kind="power", std=std), weights, size)[-1]
        trajectory.close(torch.from_numpy(direct), f"out/direct_{std}")


def test_golden_traditional_average_with_ramp_up(trajectory):
    wanted = trajectory.config["traditional"]
    config = EMAConfig(halflife_images=wanted["halflife_Mimg"] * 1e6, rampup_ratio=wanted["rampup_ratio"])
    size = trajectory.config["batch_size"]
    # EDM2 ramps up with the images after the step, EDM (which we follow) with those before it.
    average = tracked(config, trajectory.tensors["in/weights"].numpy(), size, first=size)[-1]
    trajectory.close(torch.from_numpy(average), "out/traditional_ema")


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.279])
def test_width_of_the_exponent_of_a_width_is_that_width(std):
    assert power_std(power_gamma(std)) == pytest.approx(std, rel=1e-12)


def test_kernel_products_are_the_integrals_of_the_kernels():
    images, std = fp64(4000, 2500), fp64(0.1, 0.2)
    kernels = np.stack([averaging_kernel(int(n), s, 4001) for n, s in zip(images, std, strict=True)])
    assert kernel_products(images, std, images, std) == pytest.approx(kernels @ kernels.T, rel=2e-3)


def test_mismatch_is_the_distance_between_the_sampled_kernels():
    images, std = fp64(1000, 2000, 3000, 4000), fp64(0.1, 0.1, 0.1, 0.1)
    target = (fp64(4000), fp64(0.05))
    coefficients_ST = posthoc_coefficients(images, std, *target)
    wanted = averaging_kernel(4000, 0.05, 4001)
    fitted = sum(x * averaging_kernel(int(n), 0.1, 4001) for x, n in zip(coefficients_ST[:, 0], images, strict=True))
    mismatch = kernel_mismatch(coefficients_ST, images, std, *target)[0]
    assert mismatch == pytest.approx(np.linalg.norm(fitted - wanted) / np.linalg.norm(wanted), rel=0.01)
    assert 0.1 < mismatch < 0.5


def test_a_stored_average_is_rebuilt_from_itself_alone():
    images, std = np.tile(np.arange(1.0, 9.0) * 1e6, 2), np.repeat([0.05, 0.1], 8)
    coefficients_ST = posthoc_coefficients(images, std, fp64(8e6, 5e6), fp64(0.1, 0.05))
    expected = np.zeros((16, 2))
    expected[15, 0] = expected[4, 1] = 1.0
    assert coefficients_ST == pytest.approx(expected, abs=1e-9)
    assert kernel_mismatch(coefficients_ST, images, std, fp64(8e6, 5e6), fp64(0.1, 0.05)) == pytest.approx(0, abs=1e-6)


def test_twice_as_many_snapshots_fit_better():
    def mismatch(moments):
        images, std = np.tile(np.linspace(0, 8e6, moments + 1)[1:], 2), np.repeat([0.05, 0.1], moments)
        coefficients_ST = posthoc_coefficients(images, std, fp64(8e6), fp64(0.15))
        return kernel_mismatch(coefficients_ST, images, std, fp64(8e6), fp64(0.15))[0]

    assert mismatch(32) < mismatch(16) / 2 < mismatch(8) / 4


def test_hundreds_of_snapshots_stay_well_behaved():
    images, std = np.tile(np.arange(1.0, 257.0), 2), np.repeat([0.05, 0.1], 256)
    coefficients_ST = posthoc_coefficients(images, std, fp64(256, 256), fp64(0.08, 0.25))
    assert (np.abs(coefficients_ST).sum(0) < [2.0, 3.0]).all()
    assert (kernel_mismatch(coefficients_ST, images, std, fp64(256, 256), fp64(0.08, 0.25)) < [1e-4, 1e-2]).all()
