"""What tells EDM's three U-Nets and OpenAI's apart: DDPM++, NCSN++ and both ADMs as values of one dataclass.

Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Appendix F.2, after arXiv 2011.13456 (DDPM++, NCSN++) and arXiv 2105.05233 (ADM). OpenAI's own ADM is the network of its
consistency models (arXiv 2303.01469) and, with a second time, of CTM on ImageNet (arXiv 2310.02279).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastcm.nn.init import Init, InitScheme


@dataclass(frozen=True)
class Family:
    """The fixed choices of one kind of U-Net; sizes and conditions are arguments of ``UNet``.

    embedding          noise embedding: "positional" sinusoids or random "fourier" features
    endpoint           whether the lowest positional frequency is exactly 1/10000
    sin_first          order of the two halves of the noise embedding
    fourier_scale      standard deviation of the Fourier frequencies (EDM 16, ECT 0.02)
    frequencies        rounding of the positional ones: 10000^(-i / n) as a "power" or as "exp"(-i ln(10000) / n)
    noise_scale        factor on the noise condition before it is embedded (OpenAI: 1000)
    channel_mult_noise width of the noise embedding in units of model_channels
    labels             where class labels enter: "before_mlp" (with bias, one-hot rows times sqrt(label_dim)) or "after_mlp"
    stem_mult          whether the first convolution is already as wide as the first level
    encoder            what the image pyramid beside the encoder does: nothing ("standard"), "skip" or "residual"
    decoder            whether every level of the decoder adds to the output image ("skip") or only the last ("standard")
    resample_layers    what changes the resolution: a residual "block" or a 3x3 "conv" (strided, or after nearest upsampling)
    resample_filter    filter of up- and downsampling in blocks and image pyramids
    resample_proj      whether the shortcut around a resampling block has a 1x1 convolution even at equal width
    adaptive_scale     whether the embedding gives scale and shift after the norm, or an addend before it
    skip_scale         factor on the sum of a residual branch and its shortcut
    eps                added to the variance in group norms
    min_group_channels group norms have 32 groups, fewer where these would be smaller than this
    channels_per_head  attention head width, rounding the number of heads down (none: no attention); 0: the next two count
    num_heads          attention heads of the encoder and the bottom
    num_heads_up       attention heads of the decoder
    decoder_attention  "all" decoder blocks at an attention resolution, or the "last" one only
    head               where the output layers live: "aux" (in the decoder, one per output image) or "out"
    init               distributions of the first weights
    """

    embedding: Literal["positional", "fourier"]
    endpoint: bool
    sin_first: bool
    fourier_scale: float
    frequencies: Literal["power", "exp"]
    noise_scale: float
    channel_mult_noise: int
    labels: Literal["before_mlp", "after_mlp"]
    stem_mult: bool
    encoder: Literal["standard", "skip", "residual"]
    decoder: Literal["standard", "skip"]
    resample_layers: Literal["block", "conv"]
    resample_filter: tuple[float, ...]
    resample_proj: bool
    adaptive_scale: bool
    skip_scale: float
    eps: float
    min_group_channels: int
    channels_per_head: int
    num_heads: int
    num_heads_up: int
    decoder_attention: Literal["all", "last"]
    head: Literal["aux", "out"]
    init: InitScheme

    def heads(self, channels: int, decoder: bool = False) -> int:
        """Heads of an attention layer of this width; 0 means that there is no attention."""
        if self.channels_per_head:
            return channels // self.channels_per_head
        return self.num_heads_up if decoder else self.num_heads

    def label_init(self, label_dim: int) -> Init:
        """Distribution of the label embedding: unit variance per class where labels enter after the MLP."""
        if self.labels == "before_mlp":
            return self.init.layer
        return Init("kaiming_normal", weight=math.sqrt(label_dim))


_XAVIER = InitScheme(
    layer=Init("xavier_uniform"),
    output=Init("xavier_uniform", weight=1e-5),
    qkv=Init("xavier_uniform", weight=math.sqrt(0.2)),
    augment=Init("xavier_uniform"),
)
_KAIMING_LAYER = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
_KAIMING_ZERO = Init("kaiming_uniform", weight=0.0)
_KAIMING = InitScheme(layer=_KAIMING_LAYER, output=_KAIMING_ZERO, qkv=_KAIMING_LAYER, augment=_KAIMING_ZERO)

_ADM = Family(
    embedding="positional",
    endpoint=False,
    sin_first=False,
    fourier_scale=16.0,
    frequencies="power",
    noise_scale=1.0,
    channel_mult_noise=1,
    labels="after_mlp",
    stem_mult=True,
    encoder="standard",
    decoder="standard",
    resample_layers="block",
    resample_filter=(1.0, 1.0),
    resample_proj=False,
    adaptive_scale=True,
    skip_scale=1.0,
    eps=1e-5,
    min_group_channels=4,
    channels_per_head=64,
    num_heads=1,
    num_heads_up=1,
    decoder_attention="all",
    head="out",
    init=_KAIMING,
)

_DDPMPP = Family(
    embedding="positional",
    endpoint=True,
    sin_first=True,
    fourier_scale=16.0,
    frequencies="power",
    noise_scale=1.0,
    channel_mult_noise=1,
    labels="before_mlp",
    stem_mult=False,
    encoder="standard",
    decoder="standard",
    resample_layers="block",
    resample_filter=(1.0, 1.0),
    resample_proj=True,
    adaptive_scale=False,
    skip_scale=math.sqrt(0.5),
    eps=1e-6,
    min_group_channels=4,
    channels_per_head=0,
    num_heads=1,
    num_heads_up=1,
    decoder_attention="last",
    head="aux",
    init=_XAVIER,
)

FAMILIES: dict[str, Family] = {
    "ddpmpp": _DDPMPP,
    "ncsnpp": replace(
        _DDPMPP, embedding="fourier", channel_mult_noise=2, encoder="residual", resample_filter=(1.0, 3.0, 3.0, 1.0)
    ),
    "adm": _ADM,
    "openai": replace(_ADM, frequencies="exp", noise_scale=1000.0, min_group_channels=1),
}
