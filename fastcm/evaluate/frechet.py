"""Frechet distance between two sets of feature vectors."""

import numpy as np
from jaxtyping import Float


def frechet_distance(a_NF: Float[np.ndarray, "n f"], b_MF: Float[np.ndarray, "m f"]) -> float:
    """Squared Frechet distance of the Gaussians fitted to two feature sets, in float64.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), covariances with n - 1 (arXiv 1706.08500, Eq. 6).
    The trace of the root is the sum of the square roots of the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2).
    It is biased upwards for few samples: compare values of equal n only. Raises ValueError for fewer than two rows.
    """
    if min(len(a_NF), len(b_MF)) < 2:
        raise ValueError(f"a covariance needs at least two samples, got {len(a_NF)} and {len(b_MF)}")
    a_NF, b_MF = a_NF.astype(np.float64), b_MF.astype(np.float64)
    difference = a_NF.mean(0) - b_MF.mean(0)
    cov_a, cov_b = np.cov(a_NF, rowvar=False), np.cov(b_MF, rowvar=False)
    root_a = _symmetric_root(cov_a)
    eigenvalues = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum())


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.atleast_2d(matrix))
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
