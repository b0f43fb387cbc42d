"""Images from a model, a seed and a number of steps: the same images in batches of any size."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.errors import ConfigError
from fastcm.model import Model, SamplingDefaults
from fastcm.random import Stream
from fastcm.sampling.common import NoiseSource, clip_range, round_sigmas
from fastcm.sampling.consistency import TWO_STEP_SIGMA, consistency_sigmas, sample_consistency
from fastcm.sampling.edm import sample_euler, sample_heun
from fastcm.sampling.trajectory import sample_trajectory

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "heun": sample_heun,
    "euler": sample_euler,
    "consistency": sample_consistency,
    "trajectory": sample_trajectory,
}
DEFAULT_STEPS = {"heun": 18, "euler": 18, "consistency": 2, "trajectory": 2}


def sample(
    model: Model,
    num: int,
    steps: int | None = None,
    seed: int = 0,
    *,
    labels: int | Int64[Tensor, " num"] | Float[Tensor, "num L"] | None = None,
    batch_size: int = 256,
    sampler: Literal["heun", "euler", "consistency", "trajectory"] | None = None,
    gamma: float | None = None,
    mid_sigmas: Sequence[float] | None = None,
    index_offset: int | Int64[Tensor, " num"] = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> Float32[Tensor, "num C H W"]:
    """``num`` images in about [-1, 1], fp32, on the model's device.

    Image j has the global index index_offset + j, or index_offset[j]; its latent, step noise and random label depend on that,
    on the seed and on nothing else. sampler: the model's own (``model.sampling``) unless given; "trajectory" jumps and needs a
    network with a second time, whose denoiser alone the others take. steps: "heun" makes 2 steps - 1 network evaluations, the
    others steps; by default the model's own number, or 18, and 2 for "consistency" and "trajectory".
    labels: class ids [num], one-hot rows [num, label_dim] or one class for all; None draws classes for a
    class-conditional model. gamma: of "trajectory", 0 for deterministic jumps to 1 for noise up to every level, see
    ``sample_trajectory``; by default the model's own. mid_sigmas: noise levels between the steps; those of "consistency" are by
    default the model's own or lead to its last, see ``consistency_sigmas``, those of "trajectory" the model's own or Karras'.
    sigma_min, sigma_max, rho: of the Karras grid (arXiv 2206.00364, Eq. 5), by default the model's own, clipped to its
    range; "trajectory" and "euler" end at its sigma_min, with steps + 1 levels.
    Raises ConfigError for arguments that cannot work.
    """
    sampler = model.sampling.sampler if sampler is None else sampler
    _check(num, batch_size, sampler, mid_sigmas, gamma)
    if steps is None:
        steps = (model.sampling.steps if sampler == model.sampling.sampler else 0) or DEFAULT_STEPS[sampler]
    device = next(model.parameters()).device
    given = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    form = replace(model.sampling, **{name: value for name, value in given.items() if value is not None})
    sigmas = _grid(model, sampler, steps, mid_sigmas, form)
    index = _global_indices(num, index_offset, device)
    labels = choose_labels(labels, index, seed, model.label_dim)
    indices = index.split(batch_size)
    per_batch = [None] * len(indices) if labels is None else labels.split(batch_size)
    run = SAMPLERS[sampler]
    if sampler == "consistency":
        run = partial(run, sigma_min=model.sampling.renoise_sigma_min)
    elif sampler == "trajectory":
        run = partial(run, gamma=model.sampling.gamma if gamma is None else gamma)
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


def _check(num: int, batch_size: int, sampler: str, mid_sigmas: Sequence[float] | None, gamma: float | None) -> None:
    if num < 1 or batch_size < 1:
        raise ConfigError(f"num and batch_size must be at least 1, got {num} and {batch_size}")
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if gamma is not None and sampler != "trajectory":
        raise ConfigError(f"gamma: the {sampler} sampler has none, only trajectory has; leave it out")
    if mid_sigmas is not None and sampler not in ("consistency", "trajectory"):
        raise ConfigError(f"mid_sigmas: the {sampler} sampler has no intermediate levels to choose; leave them out")
