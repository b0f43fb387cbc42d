"""Images with a model's own sampler: what ``fastcm.sample`` is."""

from collections.abc import Sequence

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from fastcm.model import Model
from fastcm.sampling.generate import generate

DEFAULT_STEPS = {"heun": 18, "consistency": 2}


def sample(
    model: Model,
    num: int,
    steps: int = 0,
    seed: int = 0,
    *,
    labels: int | Int64[Tensor, " num"] | Float[Tensor, "num L"] | None = None,
    sampler: str = "",
    mid_sigmas: Sequence[float] | None = None,
    batch_size: int = 256,
) -> Float32[Tensor, "num C H W"]:
    """``num`` images in about [-1, 1], fp32, from the latents that ``seed`` names, at any batch size.

    Sampler and intermediate noise levels are the model's own unless given. steps: network evaluations of a consistency
    model, Heun steps of a diffusion model (2 steps - 1 evaluations); 0 means 2 and 18. labels and errors: as in ``generate``.
    """
    sampler = sampler or model.sampling.sampler
    steps = steps or DEFAULT_STEPS[sampler]
    if sampler == "consistency" and mid_sigmas is None and len(model.sampling.mid_sigmas) == steps - 1:
        mid_sigmas = model.sampling.mid_sigmas
    return generate(model, num, steps, seed, labels=labels, batch_size=batch_size, sampler=sampler, mid_sigmas=mid_sigmas)
