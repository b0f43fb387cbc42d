"""A user's classifier at sampling time: it guides any sampler, or decides which images to keep."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from fastcm.diffusion.trajectory import Trajectory
from fastcm.errors import ConfigError
from fastcm.model import Model, SamplingDefaults, one_hot
from fastcm.sampling.generate import choose_labels, sample

# Called as classifier(x [N, C, H, W], sigma [N], labels); gives the logits [N, L] of all classes at that noise level, or
# log p(label | x; sigma) [N], up to a constant where it only guides.
Classifier = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Candidate k of image j has the global index j + k * CANDIDATE_STRIDE, which no run reaches by its images.
CANDIDATE_STRIDE = 2**40
UNKNOWN_CLASSES = 2**31


class ClassifierGuided(nn.Module):
    """D'(x; sigma) = D(x; sigma) + scale sigma^2 grad_x log p(y | x; sigma); arXiv 2105.05233, section 4.

    The score is (D - x) / sigma^2, so this adds scale grad_x log p to it. Jumps are guided to first order:
    G'(x, t, s) = G(x, t, s) + (1 - s / t) scale t^2 grad_x log p(y | x; t), which is the jump made of the guided g
    (arXiv 2310.02279, section 3.1); dG' / ds at s = t is the guided ODE, so many short jumps converge to it, with an error
    that halves with their length. The gradient is taken at the x that is jumped from, at its own noise level t.

    model: a ``Model``, with or without a second time. classifier: see ``Classifier``; it must know noisy images, and any
    other time than sigma is its own matter. label_dim: its number of classes; by default, and for a class-conditional model
    always, the model's. A model without classes is never given labels.
    It has what ``fastcm.sample`` and the samplers ask of a model. Raises ConfigError for a label_dim that does not fit, and,
    when called, for a classifier whose result has another shape or does not depend on x.
    """

    def __init__(self, model: Model, classifier: Classifier, scale: float = 1.0, *, label_dim: int | None = None) -> None:
        super().__init__()
        label_dim = model.label_dim if label_dim is None else label_dim
        if model.label_dim and label_dim != model.label_dim:
            raise ConfigError(f"label_dim: the model has {model.label_dim} classes, the classifier {label_dim}")
        self.model, self.classifier, self.scale, self.label_dim = model, classifier, scale, label_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.model.image_shape

    @property
    def sampling(self) -> SamplingDefaults:
        """The model's own sampler."""
        return self.model.sampling

    @property
    def second_time(self) -> bool:
        """Whether the model can jump."""
        return getattr(self.model, "second_time", False)

    @property
    def trajectory(self) -> Trajectory:
        """How the model jumps."""
        return self.model.trajectory

    @property
    def sigma_min(self) -> float:
        """Smallest noise level the model is defined on."""
        return self.model.sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest noise level the model is defined on."""
        return self.model.sigma_max

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest noise levels that the model was trained on."""
        return self.model.round_sigma(sigma)

    def forward(
        self, x_NCHW: Float[Tensor, "N C H W"], sigma: Float[Tensor, "..."] | float, labels: Tensor | None = None, **extra: Any
    ) -> Float[Tensor, "N C H W"]:
        """D'(x; sigma), fp32; arguments as for ``Model``."""
        denoised = self.model(x_NCHW, sigma, labels=self._of_model(labels), **extra)
        return denoised + self._shift(x_NCHW, sigma, labels)

    def jump(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        t: Float[Tensor, "..."] | float,
        s: Float[Tensor, "..."] | float,
        labels: Tensor | None = None,
        **extra: Any,
    ) -> Float[Tensor, "N C H W"]:
        """G'(x, t, s), fp32; arguments as for ``Model.jump``."""
        jumped = self.model.jump(x_NCHW, t, s, labels=self._of_model(labels), **extra)
        share_N = 1 - _levels(s, x_NCHW) / _levels(t, x_NCHW)
        return jumped + share_N[:, None, None, None] * self._shift(x_NCHW, t, labels)

    def _of_model(self, labels: Tensor | None) -> Tensor | None:
        return labels if self.model.label_dim else None

    def _shift(self, x_NCHW: Tensor, sigma: Tensor | float, labels: Tensor | None) -> Tensor:
        """scale sigma^2 grad_x log p(y | x; sigma)."""
        sigma_N = _levels(sigma, x_NCHW)
        gradient = log_probability_gradient(self.classifier, x_NCHW, sigma_N, labels)
        return self.scale * sigma_N[:, None, None, None] ** 2 * gradient


def log_probability(
    classifier: Classifier, x_NCHW: Float[Tensor, "N C H W"], sigma_N: Float[Tensor, " N"], labels: Tensor | None
) -> Float32[Tensor, " N"]:
    """log p(label | x; sigma) from what the classifier gives. A class it does not have has probability 0.

    Raises ConfigError for a result of another shape than [N] or [N, L], and for logits without labels that choose of them.
    """
    result = classifier(x_NCHW, sigma_N, labels)
    if tuple(result.shape) == (len(x_NCHW),):
        return result.float()
    if result.ndim != 2 or len(result) != len(x_NCHW):
        raise ConfigError(
            f"classifier: expected logits [{len(x_NCHW)}, classes] or log p [{len(x_NCHW)}], got {tuple(result.shape)}"
        )
    if labels is None:
        raise ConfigError("labels: the classifier gives logits of all classes; say which class each image is to have")
    rows = labels.float() if labels.is_floating_point() else one_hot(labels, result.shape[1])
    if rows.shape != result.shape:
        raise ConfigError(f"labels: rows of {rows.shape[-1]} classes do not fit the classifier's {result.shape[1]}")
    # A class out of range is a row of zeros, which is found on no host; its sum makes the probability 0, not 1.
    return (result.float().log_softmax(1) * rows).sum(1) + rows.sum(1).log()


def log_probability_gradient(
    classifier: Classifier, x_NCHW: Float[Tensor, "N C H W"], sigma_N: Float[Tensor, " N"], labels: Tensor | None
) -> Float32[Tensor, "N C H W"]:
    """grad_x log p(label | x; sigma), also where gradients are off. Raises ConfigError for a classifier that has none."""
    with torch.enable_grad():
        x_NCHW = x_NCHW.detach().float().requires_grad_()
        log_p_N = log_probability(classifier, x_NCHW, sigma_N, labels)
        if not log_p_N.requires_grad:
            raise ConfigError("classifier: its result has no gradient in x; compute it in PyTorch, without no_grad or detach")
        return torch.autograd.grad(log_p_N.sum(), x_NCHW)[0]


@torch.no_grad()
def sample_with_rejection(
    model: Model,
    num: int,
    steps: int | None = None,
    seed: int = 0,
    *,
    classifier: Classifier,
    threshold: float | None = None,
    candidates: int = 16,
    labels: int | Int64[Tensor, " num"] | Float[Tensor, "num L"] | None = None,
    batch_size: int = 256,
    index_offset: int = 0,
    classifier_sigma: float = 0.002,
    **options: Any,
) -> Float32[Tensor, "num C H W"]:
    """``num`` images that a classifier finds to be of their class, drawn again where they are not (arXiv 2310.02279).

    threshold given: image j is drawn again until p(label_j | x) >= threshold, at most ``candidates`` times. threshold None:
    the most probable of ``candidates`` draws. Every image keeps its label, so that classes stay as frequent as they were.
    The first candidates are the images of ``fastcm.sample``; what comes out depends on the seed and on index_offset + j only.

    labels: as for ``fastcm.sample``; for a model without classes, class ids that only the classifier sees. classifier: see
    ``Classifier``; classifier_sigma: the noise level that it is told, of finished images. options: what else
    ``fastcm.sample`` takes. Waits for the device once per round of candidates.
    Raises ConfigError for arguments that cannot work, and where an image has no candidate that can be kept.
    """
    _check(num, candidates, threshold)
    device = next(model.parameters()).device
    index = torch.arange(index_offset, index_offset + num, device=device)
    labels = _wanted(labels, index, seed, model.label_dim)
    least = torch.finfo(torch.float32).min if threshold is None else math.log(threshold)
    left, images, best = torch.arange(num, device=device), None, None
    for candidate in range(candidates):
        where, wanted = index[left] + candidate * CANDIDATE_STRIDE, None if labels is None else labels[left]
        given = wanted if model.label_dim else None
        drawn = sample(model, len(left), steps, seed, labels=given, batch_size=batch_size, index_offset=where, **options)
        log_p = _judge(classifier, drawn, classifier_sigma, wanted, batch_size)
        if candidate == 0:
            images, best = drawn, log_p
        better = log_p > best[left]
        images[left[better]], best[left[better]] = drawn[better], log_p[better]
        if threshold is not None:
            left = (best < least).nonzero()[:, 0]
        if not len(left):
            break
    _require_all(best, least, candidates, threshold)
    return images


def _wanted(labels: int | Tensor | None, index: Tensor, seed: int, label_dim: int) -> Tensor | None:
    """The label of each image. How many classes the classifier of a model without any has is seen when it is called."""
    if labels is None and not label_dim:
        return None
    return choose_labels(labels, index, seed, label_dim or UNKNOWN_CLASSES)


def _judge(classifier: Classifier, images: Tensor, sigma: float, labels: Tensor | None, batch_size: int) -> Tensor:
    """log p(label | x), -inf where the classifier gives NaN."""
    batches = images.split(batch_size)
    per_batch = [None] * len(batches) if labels is None else labels.split(batch_size)
    judged = [
        log_probability(classifier, batch, batch.new_full((len(batch),), sigma), wanted)
        for batch, wanted in zip(batches, per_batch, strict=True)
    ]
    log_p = torch.cat(judged)
    return log_p.masked_fill(log_p.isnan(), -torch.inf)


def _check(num: int, candidates: int, threshold: float | None) -> None:
    if num < 1 or candidates < 1:
        raise ConfigError(f"num and candidates must be at least 1, got {num} and {candidates}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ConfigError(f"threshold: expected a probability above 0 and up to 1, got {threshold}")


def _require_all(best: Tensor, least: float, candidates: int, threshold: float | None) -> None:
    missing = int((best < least).sum())
    if missing:
        wish = "above 0" if threshold is None else f"of at least {threshold:g}"
        raise ConfigError(
            f"threshold: {missing} of {len(best)} images have no candidate among {candidates} with p(label | x) {wish}; the "
            f"worst image comes to {best.min().exp():.3g}. Lower the threshold, raise candidates, or see whether the "
            "classifier knows these labels, and images in [-1, 1]"
        )


def _levels(sigma: Tensor | float, x_NCHW: Tensor) -> Float32[Tensor, " N"]:
    return torch.as_tensor(sigma, device=x_NCHW.device, dtype=torch.float32).expand(len(x_NCHW))
