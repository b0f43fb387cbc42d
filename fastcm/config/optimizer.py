"""The optimizer section of a phase."""

from typing import Annotated, Literal

from pydantic import Field

from fastcm.config.section import Fraction, Section


class OptimizerConfig(Section):
    """Adam or RAdam with linear warm-up and, if asked for, inverse-square-root decay and a linear cool-down to zero."""

    kind: Literal["adam", "radam"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    warmup_images: Annotated[int, Field(ge=0)] = 0
    decay_images: Annotated[int, Field(ge=0)] = 0  # images after which lr falls as 1/sqrt(images), as EDM2's does; 0 = never
    cooldown_images: Annotated[int, Field(ge=0)] = 0
