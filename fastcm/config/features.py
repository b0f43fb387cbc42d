"""Frozen feature networks: which ones, and where their weights come from."""

from typing import Annotated, Literal

from pydantic import Field

from fastcm.config.section import Section


class FeaturesConfig(Section):
    """Feature networks of perceptual distances and of the projected discriminator; nothing is fetched unless asked for.

    Weights come from a file (.safetensors, or a state dict that torch saved), from the Hugging Face Hub ("download"), or are
    drawn at random ("random", for trials). What is used needs a source; empty names none.
    """

    lpips: str = ""  # source of VGG16's weights
    lpips_linear: str = ""  # a file of LPIPS's linear weights; empty = those that come with torchmetrics
    lpips_resize: Annotated[int, Field(ge=0)] = 224  # side that images below 256 pixels are resized to; 0 = their own
    lpips_replace_pooling: bool = True  # average instead of maximum pooling, as consistency models train with
    discriminator: dict[str, str] = Field(  # source of each network's weights, by timm's name
        {"deit_base_distilled_patch16_224": "", "tf_efficientnet_lite0": ""}, min_length=1
    )
    distance: dict[str, str] = Field(  # the same for the distance "features"
        {"deit_base_distilled_patch16_224": "", "tf_efficientnet_lite0": ""}, min_length=1
    )
    distance_augment: bool = True  # differentiable augmentation of the images that it compares
    size: Annotated[int, Field(ge=32)] = 224  # side of what they see
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of all feature networks; distances and logits stay fp32
