"""Bits per dimension of images under a diffusion model or CTM's network, by the probability flow ODE.

The method is that of arXiv 2011.13456, section 4.3 and appendix D.2; of CTM (arXiv 2310.02279) the score is g(x, t, t).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from fastcm.errors import ConfigError, DataError
from fastcm.random import Stream
from fastcm.sampling.common import Denoiser, clip_range
from fastcm.sampling.dequantize import dequantized
from fastcm.sampling.generate import choose_labels
from fastcm.sampling.likelihood_ode import follow_ode, official_residual_sigma, prior_log_density, residual_nats

Z_95 = 1.959964  # of the normal distribution, for 95 % intervals
MAX_PIXEL = 1 + 1e-6


@dataclass(frozen=True)
class LikelihoodSettings:
    """How a likelihood is computed; see ``bits_per_dim``. Raises ConfigError for values that cannot work."""

    probes: int
    probe: str
    rtol: float
    atol: float
    sigma_min: float
    sigma_max: float
    dequantize: str
    levels: int | None
    residual: str

    def __post_init__(self) -> None:
        if self.probe not in ("rademacher", "gaussian", "exact"):
            raise ConfigError(f"probe: expected rademacher, gaussian or exact, got {self.probe!r}")
        if self.residual not in ("none", "corrected", "official"):
            raise ConfigError(f"residual: expected none, corrected or official, got {self.residual!r}")
        if self.dequantize == "truncated_normal" and self.residual != "none":
            raise ConfigError(f"residual {self.residual!r}: truncated-normal noise is a bound by itself; use residual='none'")
        if self.probes < 1:
            raise ConfigError(f"probes: expected at least 1, got {self.probes}")
        if not (0 < self.rtol < 1 and 0 < self.atol < 1):
            raise ConfigError(f"rtol and atol must lie in (0, 1), got {self.rtol} and {self.atol}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:  # so that NaN is refused too
            raise ConfigError(f"expected 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Bits per dimension of N images and what they were computed with.

    bpd_KN: by probe and image, one row for the exact trace; offset_bits: what the discretisation added to the density's own
    -log2 p / d; evaluations_N: of the denoiser, for the batch that an image was in.
    """

    bpd_KN: Float64[Tensor, "K N"]
    evaluations_N: Int64[Tensor, " N"]
    offset_bits: float
    settings: LikelihoodSettings

    @property
    def bpd(self) -> Float64[Tensor, " N"]:
        """Bits per dimension of each image, the mean over its probes."""
        return self.bpd_KN.mean(0)

    @property
    def mean(self) -> float:
        """Mean over the images."""
        return self.bpd.mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean as an estimate for all images of their kind; it includes the probes' error. None for one image."""
        num = self.bpd_KN.shape[1]
        return (self.bpd.std() / math.sqrt(num)).item() if num > 1 else None

    @property
    def probe_standard_error(self) -> float | None:
        """Of the mean as an estimate for these very images, over probes: 0 for the exact trace, None for one probe."""
        num_probes, num = self.bpd_KN.shape
        if self.settings.probe == "exact":
            return 0.0
        return (self.bpd_KN.var(0).sum() / num_probes).sqrt().item() / num if num_probes > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean, over images; None for one image."""
        return None if self.standard_error is None else self._around(self.standard_error)

    @property
    def probe_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean of these images, over probes; None for one probe."""
        return None if self.probe_standard_error is None else self._around(self.probe_standard_error)

    @property
    def mean_evaluations(self) -> float:
        """Evaluations of the denoiser per image, the NFE."""
        return self.evaluations_N.double().mean().item()

    def _around(self, error: float) -> tuple[float, float]:
        return self.mean - Z_95 * error, self.mean + Z_95 * error


def bits_per_dim(
    model: Denoiser,
    images_NCHW: Float[Tensor, "N C H W"],
    *,
    labels: int | Int64[Tensor, " N"] | Float[Tensor, "N L"] | None = None,
    index: Int64[Tensor, " M"] | None = None,
    seed: int = 0,
    probes: int = 1,
    probe: Literal["rademacher", "gaussian", "exact"] = "rademacher",
    rtol: float = 1e-3,
    atol: float = 1e-3,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    dequantize: Literal["uniform", "truncated_normal", "none"] = "uniform",
    levels: int | None = 256,
    residual: Literal["none", "corrected", "official"] = "none",
    batch_size: int = 64,
) -> Likelihood:
    """-log2 p(image) / d of images in [-1, 1] with d dimensions, by the ODE from sigma_min to sigma_max.

    ln p(x) = ln N(x(sigma_max); 0, sigma_max^2 I) + int div(dx / dsigma) dsigma; ``dequantize`` and levels, the values a pixel
    can have, make bits per dimension of it, see ``dequantize.dequantized``.

    model: a denoiser; of a CTM model this is g(x, t, t). labels: of a class-conditional model: class ids, one-hot rows (rows
    of zeros for no class) or one class for all. index: the number of each image, by default 0, 1, ..; it and the seed name
    the image's noise and probes, so that batches change results within the tolerance only (the images of a batch share the
    solver's steps). probes: random vectors per image for the trace, for one vector-Jacobian product an evaluation each;
    "exact" takes d products instead. rtol, atol: see ``follow_ode``. sigma_min, sigma_max: 0.002 and 80 within the model's
    range unless given.

    residual: "none" evaluates p_sigma_min at the image itself. "corrected" is CTM's bound on p_0: noise of sigma_min is added
    to the image, and the price of taking it off again, ``residual_nats``, is paid. "official" reproduces CTM's official code,
    which is wrong: it takes that price at sigma_min^(1/7) = 0.41 and not at sigma_min = 0.002, because the power 7 of its
    time is missing there. At 0.41 a denoiser errs by much less than sigma, so the price comes out too low: by up to
    1 / (2 ln 2) = 0.72 bits/dim, and by 0.47 for a Gaussian of deviation 0.3.

    Raises ConfigError for arguments that cannot work, DataError for images out of range or not on their levels,
    CheckpointError for a model whose result is not finite.
    """
    _check_model(model)
    sigma_min, sigma_max = _noise_range(model, sigma_min, sigma_max)
    settings = LikelihoodSettings(probes, probe, rtol, atol, sigma_min, sigma_max, dequantize, levels, residual)
    device = next(model.parameters(), images_NCHW).device if isinstance(model, nn.Module) else images_NCHW.device
    images_NCHW = images_NCHW.to(device)
    _check_images(model, images_NCHW)
    index = torch.arange(len(images_NCHW), device=device) if index is None else index.to(device)
    if batch_size < 1 or len(index) != len(images_NCHW):
        raise ConfigError(f"index: {len(index)} for {len(images_NCHW)} images, batch_size: {batch_size}; expected at least 1")
    labels = _labels(model, labels, index)
    start = dequantized(images_NCHW, dequantize, levels, sigma_min, seed, index)
    batches = [slice(first, first + batch_size) for first in range(0, len(index), batch_size)]
    nats, evaluations = [], torch.empty_like(index)
    for rows in batches:
        rows_labels = None if labels is None else labels[rows]
        nats_KN, evaluations[rows] = _nats(model, start.images_NCHW[rows], index[rows], rows_labels, seed, settings)
        nats.append(nats_KN)
    bpd_KN = torch.cat(nats, 1) / (images_NCHW[0].numel() * math.log(2)) + start.offset_bits
    return Likelihood(bpd_KN, evaluations, start.offset_bits, settings)


def draw_probes(
    kind: Literal["rademacher", "gaussian"],
    num: int,
    seed: int,
    index_N: Int64[Tensor, " N"],
    image_shape: tuple[int, int, int],
) -> Float[Tensor, "K N C H W"]:
    """``num`` random vectors per image with E[v v^T] = I, of signs or of normal numbers, from the stream "likelihood_probes".

    The trace of J has variance 2 |J|^2 (Frobenius, J symmetric) with normal numbers, and without J's diagonal with signs.
    """
    stream, (channels, height, width) = Stream(seed, "likelihood_probes"), image_shape
    if kind == "gaussian":
        return torch.stack([stream.image_normal(index_N, image_shape, draw=k) for k in range(num)])
    bits = [stream.bits(index_N, (height, width, channels), draw=k).permute(0, 3, 1, 2) for k in range(num)]
    return (torch.stack(bits) & 1).float() * 2 - 1


def _nats(
    model: Denoiser, x_NCHW: Tensor, index_N: Tensor, labels: Tensor | None, seed: int, settings: LikelihoodSettings
) -> tuple[Tensor, int]:
    """(-ln p by probe and image, evaluations) of one batch."""
    shape, low, high = tuple(x_NCHW.shape[1:]), settings.sigma_min, settings.sigma_max
    price_N, start_NCHW = x_NCHW.new_zeros(len(x_NCHW)), x_NCHW
    if settings.residual != "none":
        stream = Stream(seed, "likelihood_noise")
        start_NCHW = x_NCHW + low * stream.image_normal(index_N, shape).double()
        level = low if settings.residual == "corrected" else official_residual_sigma(low)
        price_N = residual_nats(model, x_NCHW, stream.image_normal(index_N, shape, draw=1), level, labels)
    probes = None if settings.probe == "exact" else draw_probes(settings.probe, settings.probes, seed, index_N, shape)
    path = follow_ode(model, start_NCHW, low, high, labels=labels, probes_KNCHW=probes, rtol=settings.rtol, atol=settings.atol)
    return price_N - prior_log_density(path.end_NCHW, high) - path.gain_KN, path.num_evaluations


def _noise_range(model: Denoiser, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    usual = clip_range(model, 0.002, 80.0)
    low, high = usual[0] if sigma_min is None else sigma_min, usual[1] if sigma_max is None else sigma_max
    if clip_range(model, low, high) != (low, high):
        allowed = clip_range(model, 0.0, math.inf)
        raise ConfigError(
            f"sigma_min {low} to sigma_max {high}: the model is defined from {allowed[0]:g} to {allowed[1]:g} only"
        )
    return low, high


def _labels(model: Denoiser, labels: Tensor | int | None, index: Tensor) -> Tensor | None:
    label_dim = getattr(model, "label_dim", 0)
    if label_dim and labels is None:
        raise ConfigError(f"labels: this model has {label_dim} classes; give each image's, or rows of zeros for no class")
    return choose_labels(labels, index, 0, label_dim)


def _check_images(model: Denoiser, images_NCHW: Tensor) -> None:
    shape = tuple(getattr(model, "image_shape", images_NCHW.shape[1:]))
    if images_NCHW.ndim != 4 or len(images_NCHW) == 0 or tuple(images_NCHW.shape[1:]) != shape:
        expected = ", ".join(map(str, shape))
        raise DataError(f"images: expected at least one, [N, {expected}], got {list(images_NCHW.shape)}")
    if not images_NCHW.is_floating_point():
        raise DataError(f"images: expected floats in [-1, 1], got {images_NCHW.dtype}; for uint8 take x / 127.5 - 1")
    low, high = images_NCHW.aminmax()
    if not (low >= -MAX_PIXEL and high <= MAX_PIXEL):
        raise DataError(f"images: expected values in [-1, 1], got {low:.4g} to {high:.4g}; for 0 to 255 take x / 127.5 - 1")


def _check_model(model: Denoiser) -> None:
    sampling = getattr(model, "sampling", None)
    if sampling is not None and sampling.sampler == "consistency" and not getattr(model, "second_time", False):
        raise ConfigError(
            "this is a consistency model: it jumps to clean images and has no score, so no likelihood; "
            "take the diffusion model it was made from, or a CTM model"
        )
