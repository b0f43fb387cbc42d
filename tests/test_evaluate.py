"""Frechet distance against closed forms, and the digit evaluation as a user runs it."""

import numpy as np
import pytest
import torch

from fastcm.data.dataset import load_resident
from fastcm.data.sources import open_source
from fastcm.evaluate.digits import DigitEvaluator
from fastcm.evaluate.frechet import frechet_distance
from fastcm.io.images import to_uint8
from fastcm.random import Stream


def gaussian(num, mean, root, purpose):
    """Samples with exactly this mean and covariance root root^T."""
    z = Stream(0, purpose).normal(torch.arange(num), (len(mean),)).double().numpy()
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return z @ np.asarray(root).T + np.asarray(mean)


def test_distance_of_equal_sets_is_zero():
    a = gaussian(500, [1.0, 2.0, 3.0], np.diag([1.0, 2.0, 3.0]), "a")
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_of_gaussians_has_its_closed_form():
    # |m1 - m2|^2 + sum (s1 - s2)^2 where the covariances commute
    a = gaussian(400, [0.0, 0.0], np.diag([1.0, 2.0]), "a")
    b = gaussian(300, [3.0, 4.0], np.diag([2.0, 5.0]), "b")
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 9, rel=1e-9)


def test_distance_of_covariances_that_do_not_commute_equals_the_matrix_root():
    from scipy.linalg import sqrtm

    a = gaussian(400, [0.0, 0.0, 1.0], np.array([[1, 0, 0], [0.5, 1, 0], [0.2, 0.3, 2.0]]), "a")
    b = gaussian(400, [0.0, 1.0, 0.0], np.array([[2, 0, 0], [-0.7, 1, 0], [0.1, 0.9, 0.5]]), "b")
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = 2.0 + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_survives_a_feature_that_never_varies():
    a = gaussian(100, [0.0, 0.0], np.eye(2), "a")
    a = np.concatenate([a, np.ones((100, 1))], axis=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


@pytest.fixture(scope="module")
def evaluator():
    return DigitEvaluator(load_resident(open_source("digits")))


def test_references_tell_real_digits_from_noise(evaluator):
    references = evaluator.references()
    assert 0 < references["real against real"] < 1
    assert references["untrained noise"] > 30 * references["real against real"]


def test_distance_rises_with_blur(evaluator):
    digits = open_source("digits")
    real = torch.from_numpy(np.stack([digits.read(i) for i in range(898)])).permute(0, 3, 1, 2).float() / 127.5 - 1
    distances = [evaluator.distance(to_uint8(real * (1 - blur) + blur * real.mean(0))) for blur in (0.0, 0.1, 0.3)]
    assert distances == sorted(distances)
    assert distances[2] > 5 * distances[0]


def test_evaluation_is_the_same_every_time(evaluator):
    assert DigitEvaluator(load_resident(open_source("digits"))).references() == evaluator.references()
