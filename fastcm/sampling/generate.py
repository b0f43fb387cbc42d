"""Images from a model, a seed and a number of steps: the same images in batches of any size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Literal, TypedDict, Unpack

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.errors import ConfigError
from fastcm.model import Model, SamplingDefaults
from fastcm.random import MAX_SEED, Stream
from fastcm.sampling.ancestral import sample_ancestral
from fastcm.sampling.common import NoiseSource, clip_range, round_sigmas
from fastcm.sampling.consistency import TWO_STEP_SIGMA, consistency_sigmas, sample_consistency
from fastcm.sampling.dpm import sample_dpm
from fastcm.sampling.edm import sample_euler, sample_heun
from fastcm.sampling.trajectory import sample_trajectory

MAX_STEPS = 100_000  # far beyond any use, and a grid of so many levels is still small


class SamplerOptions(TypedDict, total=False):
    """The constants of the samplers; None is as good as leaving one out."""

    s_churn: float | None
    s_tmin: float | None
    s_tmax: float | None
    s_noise: float | None
    midpoint_rho: float | None
    eta: float | None
    gamma: float | None


@dataclass(frozen=True)
class Sampler:
    """A sampler as ``sample`` knows it: its function, its usual number of steps, which of ``SamplerOptions`` it takes."""

    run: Callable[..., Tensor]
    steps: int
    options: tuple[str, ...] = ()


CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
SAMPLERS = {
    "heun": Sampler(sample_heun, 18, CHURN),
    "euler": Sampler(sample_euler, 18),
    "ancestral": Sampler(sample_ancestral, 18, ("eta",)),
    "dpm": Sampler(sample_dpm, 18, (*CHURN, "midpoint_rho")),
    "consistency": Sampler(sample_consistency, 2),
    "trajectory": Sampler(sample_trajectory, 2, ("gamma",)),
}


def sample(
    model: Model,
    num: int,
    steps: int | None = None,
    seed: int = 0,
    *,
    labels: int | Int64[Tensor, " num"] | Float[Tensor, "num L"] | None = None,
    batch_size: int = 256,
    sampler: Literal["heun", "euler", "ancestral", "dpm", "consistency", "trajectory"] | None = None,
    mid_sigmas: Sequence[float] | None = None,
    index_offset: int | Int64[Tensor, " num"] = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    **options: Unpack[SamplerOptions],
) -> Float32[Tensor, "num C H W"]:
    """``num`` images in about [-1, 1], fp32, on the model's device.

    Image j has the global index index_offset + j, or index_offset[j]; its latent, step noise and random label depend on that,
    on the seed and on nothing else. sampler: the model's own (``model.sampling``) unless given; "trajectory" jumps and needs a
    network with a second time, whose denoiser alone the others take. steps: "heun" and "dpm" make 2 steps - 1 network
    evaluations ("dpm" with a midpoint_rho one more), the others steps; by default the model's own number, or 18, and 2 for
    "consistency" and "trajectory".
    labels: class ids [num], one-hot rows [num, label_dim] or one class for all; None draws classes for a
    class-conditional model. mid_sigmas: noise levels between the steps; those of "consistency" are by
    default the model's own or lead to its last, see ``consistency_sigmas``, those of "trajectory" the model's own or Karras'.
    sigma_min, sigma_max, rho: of the Karras grid (arXiv 2206.00364, Eq. 5), by default the model's own, clipped to its
    range; "trajectory" and "euler" end at its sigma_min, with steps + 1 levels.
    options: constants of the sampler's function, by default its own: s_churn, s_tmin, s_tmax, s_noise of "heun" and "dpm",
    midpoint_rho of "dpm", eta of "ancestral", gamma of "trajectory" (by default the model's own).
    Raises ConfigError for arguments that cannot work.
    """
    sampler = model.sampling.sampler if sampler is None else sampler
    _check(num, batch_size, seed, sampler, mid_sigmas)
    run = _with_options(sampler, options, model.sampling)
    if steps is None:
        steps = (model.sampling.steps if sampler == model.sampling.sampler else 0) or SAMPLERS[sampler].steps
    device = next(model.parameters()).device
    _check_grid(steps, rho)
    form = replace(model.sampling, **_given({"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}))
    sigmas = _grid(model, sampler, steps, mid_sigmas, form)
    index = _global_indices(num, index_offset, device)
    labels = choose_labels(labels, index, seed, model.label_dim)
    indices = index.split(min(batch_size, num))
    per_batch = [None] * len(indices) if labels is None else labels.split(min(batch_size, num))
    return torch.cat([_sample(model, run, sigmas, seed, *batch) for batch in zip(indices, per_batch, strict=True)])


def draw_labels(model: Model, num: int, seed: int, label: int | None = None) -> Int64[Tensor, " num"] | None:
    """The classes that ``sample`` gives ``num`` images: ``label`` for all, or random ones; None for a model without classes."""
    index = torch.arange(num, device=next(model.parameters()).device)
    return choose_labels(label, index, seed, model.label_dim)


def latents(seed: int, index_N: Int64[Tensor, " N"], image_shape: tuple[int, int, int]) -> Float32[Tensor, "N C H W"]:
    """The unit normal latents of these images, from the stream "latents"."""
    return Stream(seed, "latents").image_normal(index_N, image_shape)


def step_noise(seed: int, index_N: Int64[Tensor, " N"], image_shape: tuple[int, int, int]) -> NoiseSource:
    """The source of fresh noise for these images, from the stream "sampler_noise"."""
    return lambda step: Stream(seed, "sampler_noise").image_normal(index_N, image_shape, draw=step)


def choose_labels(
    labels: int | Tensor | None, index: Int64[Tensor, " num"], seed: int, label_dim: int
) -> Int64[Tensor, " num"] | Float[Tensor, "num L"] | None:
    """Labels for ``sample``: the given ones, checked, or classes drawn from the stream "labels".

    Raises ConfigError for labels that the model does not have.
    """
    if label_dim == 0:
        if labels is not None:
            raise ConfigError("labels: this model has no classes; leave them out")
        return None
    if labels is None:
        return Stream(seed, "labels").integers(index, label_dim)
    labels = torch.as_tensor(labels, device=index.device)
    labels = labels.expand(len(index)) if labels.ndim == 0 else labels
    if len(labels) != len(index):
        raise ConfigError(f"labels: expected one for each of {len(index)} images, got {len(labels)}")
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        raise ConfigError("labels: one-hot rows must be finite numbers")
    if labels.ndim == 1 and bool(((labels < 0) | (labels >= label_dim)).any()):
        raise ConfigError(f"labels: class ids must be in [0, {label_dim}), got {labels.min()} to {labels.max()}")
    return labels


def _global_indices(num: int, offset: int | Tensor, device: torch.device) -> Int64[Tensor, " num"]:
    if isinstance(offset, Tensor) and tuple(offset.shape) != (num,):
        raise ConfigError(f"index_offset: expected a number, or one index for each of {num} images, got {tuple(offset.shape)}")
    return offset.to(device) if isinstance(offset, Tensor) else torch.arange(offset, offset + num, device=device)


def _grid(
    model: Model,
    sampler: str,
    steps: int,
    mid_sigmas: Sequence[float] | None,
    form: SamplingDefaults,
) -> Float64[Tensor, " S1"]:
    """The noise levels of a sampler, within the range of the model."""
    low, high = clip_range(model, form.sigma_min, form.sigma_max)
    rho = form.rho
    own = model.sampling.mid_sigmas
    mid_sigmas = own if mid_sigmas is None and len(own) == steps - 1 else mid_sigmas
    if sampler == "consistency":
        return consistency_sigmas(steps, mid_sigmas, high, last_sigma=own[-1] if own else TWO_STEP_SIGMA)
    if sampler == "trajectory" and mid_sigmas is not None:
        return torch.cat((consistency_sigmas(steps, mid_sigmas, high)[:-1], torch.tensor([low], dtype=torch.float64)))
    if sampler in ("euler", "trajectory"):
        # The last step ends at sigma_min: progressive distillation (arXiv 2202.00512) and CTM (2310.02279).
        return round_sigmas(model, karras_sigmas(steps + 1, low, high, rho)[:-1])
    return round_sigmas(model, karras_sigmas(steps, low, high, rho))


def _sample(
    model: Model,
    sampler: Callable[..., Tensor],
    sigmas: Float64[Tensor, " S1"],
    seed: int,
    index_N: Int64[Tensor, " N"],
    labels: Tensor | None,
) -> Float32[Tensor, "N C H W"]:
    x = latents(seed, index_N, model.image_shape).double() * sigmas[0]
    noise = step_noise(seed, index_N, model.image_shape)
    return sampler(model, x, sigmas, labels=labels, noise=noise).float()


def _check(num: int, batch_size: int, seed: int, sampler: str, mid_sigmas: Sequence[float] | None) -> None:
    if not (isinstance(num, Integral) and isinstance(batch_size, Integral)) or num < 1 or batch_size < 1:
        raise ConfigError(f"num and batch_size must be whole numbers of at least 1, got {num} and {batch_size}")
    if not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed: expected a whole number in [0, 2^32), got {seed}")
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if mid_sigmas is not None and sampler not in ("consistency", "trajectory"):
        raise ConfigError(f"mid_sigmas: the {sampler} sampler has no intermediate levels to choose; leave them out")


def _check_grid(steps: int, rho: float | None) -> None:
    if not isinstance(steps, Integral) or not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps: expected a whole number of at most {MAX_STEPS} and at least 1, got {steps}")
    if rho is not None and not 1 <= rho < math.inf:  # so that NaN is refused too
        raise ConfigError(f"rho: expected a finite number of at least 1, got {rho}")


def _with_options(sampler: str, options: Mapping[str, float | None], own: SamplingDefaults) -> Callable[..., Tensor]:
    """The sampler's function with its constants: the given ones, then the model's own."""
    given = _given(options)
    for name in given:
        if name not in SAMPLERS[sampler].options:
            others = [other for other, entry in SAMPLERS.items() if name in entry.options]
            place = f"it belongs to {' and '.join(others)}" if others else "nor has any other"
            raise ConfigError(f"{name}: the {sampler} sampler has no such option, {place}; leave it out")
        if not isinstance(given[name], Real):
            raise ConfigError(f"{name}: expected a number, got {given[name]!r}")
        if name in CHURN[1:] and not given.get("s_churn"):
            raise ConfigError(f"{name}: there is no churn without s_churn above 0; give that too, or leave {name} out")
    defaults = {"consistency": {"sigma_min": own.renoise_sigma_min}, "trajectory": {"gamma": own.gamma}}
    return partial(SAMPLERS[sampler].run, **{**defaults.get(sampler, {}), **given})


def _given(options: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in options.items() if value is not None}
