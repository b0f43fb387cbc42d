"""Post-hoc EMA (arXiv 2312.02696, section 3.2 and appendix C): weight averages of any length out of stored ones.

A power-function EMA after t images averages the weights theta with the kernel f_t(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),
0 <= tau <= t (Eq. 2). A sum of stored averages averages with the sum of their kernels; the best sum is the least-squares fit
to the kernel that is wanted. All of it is fp64.

Suffixes of shapes: S stored averages, T targets.
"""

import numpy as np
from jaxtyping import Float64

from fastcm.train.schedules import power_gamma

_gamma = np.vectorize(power_gamma, otypes=[np.float64])


def averaging_kernel(images: int, std: float, num_images: int) -> Float64[np.ndarray, " N"]:
    """The kernel of relative width ``std`` after ``images`` images, sampled at 0, 1, .., num_images - 1 images.

    tau^gamma up to ``images``, 0 beyond, over its sum (arXiv 2312.02696, Eq. 2, for weights that change once an image).
    """
    ratio_N = np.minimum(np.arange(num_images) / images, 1.0)
    values_N = np.where(np.arange(num_images) <= images, ratio_N ** power_gamma(std), 0.0)
    return values_N / values_N.sum()


def kernel_products(
    images_A: Float64[np.ndarray, " A"],
    std_A: Float64[np.ndarray, " A"],
    images_B: Float64[np.ndarray, " B"],
    std_B: Float64[np.ndarray, " B"],
) -> Float64[np.ndarray, "A B"]:
    """Inner products of averaging kernels, the integral of f_a(tau) f_b(tau), in 1 / images.

    With the earlier end t and the later end u, whose exponent is gamma_u:
    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t / u)^gamma_u / u (arXiv 2312.02696, appendix C.3).
    """
    gamma_A, gamma_B = _gamma(std_A), _gamma(std_B)
    earlier_AB, later_AB = np.minimum.outer(images_A, images_B), np.maximum.outer(images_A, images_B)
    power_AB = np.where(images_A[:, None] > images_B, gamma_A[:, None], gamma_B)
    scale_AB = np.outer(gamma_A + 1.0, gamma_B + 1.0) / (np.add.outer(gamma_A, gamma_B) + 1.0)
    return scale_AB * (earlier_AB / later_AB) ** power_AB / later_AB


def posthoc_coefficients(
    images_S: Float64[np.ndarray, " S"],
    std_S: Float64[np.ndarray, " S"],
    images_T: Float64[np.ndarray, " T"],
    std_T: Float64[np.ndarray, " T"],
) -> Float64[np.ndarray, "S T"]:
    """Weights of the stored averages in each target; every column sums to 1.

    The column x solves A x = b with A = <f_s, f_s'> and b = <f_s, f_target>, and is divided by its sum
    (arXiv 2312.02696, appendix C.3, algorithm 3). Kernels get unit norm first: early ones are far larger than late ones.
    """
    products_SS = kernel_products(images_S, std_S, images_S, std_S)
    norm_S = np.sqrt(np.diag(products_SS))
    scaled_ST = kernel_products(images_S, std_S, images_T, std_T) / norm_S[:, None]
    fit_ST, *_ = np.linalg.lstsq(products_SS / np.outer(norm_S, norm_S), scaled_ST, rcond=None)
    coefficients_ST = fit_ST / norm_S[:, None]
    return coefficients_ST / coefficients_ST.sum(0)


def kernel_mismatch(
    coefficients_ST: Float64[np.ndarray, "S T"],
    images_S: Float64[np.ndarray, " S"],
    std_S: Float64[np.ndarray, " S"],
    images_T: Float64[np.ndarray, " T"],
    std_T: Float64[np.ndarray, " T"],
) -> Float64[np.ndarray, " T"]:
    """Relative L2 distance between each target kernel q and the one that its coefficients x give.

    |q - sum_s x_s f_s| / |q|, with the square expanded into ``kernel_products``; about 1e-8 of it is rounding.
    """
    own_T = np.diag(kernel_products(images_T, std_T, images_T, std_T))
    cross_T = (coefficients_ST * kernel_products(images_S, std_S, images_T, std_T)).sum(0)
    fitted_T = (coefficients_ST * (kernel_products(images_S, std_S, images_S, std_S) @ coefficients_ST)).sum(0)
    return np.sqrt(np.maximum((own_T - 2 * cross_T + fitted_T) / own_T, 0.0))
