"""The network section: a U-Net of EDM's families or OpenAI's, or EDM2's."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_serializer, model_validator

from fastcm.config.section import Fraction, Positive, Section


def _with_a_sum(taps: tuple[float, ...]) -> tuple[float, ...]:
    if not sum(taps):  # by which they are divided
        raise ValueError("the taps of a filter must not sum to 0")
    return taps


class FamilyOverrides(Section):
    """Where a network differs from its family (``fastcm.nn.Family`` explains each field); what is not given is the family's."""

    embedding: Literal["positional", "fourier"] | None = None
    channel_mult_noise: Positive | None = None
    encoder: Literal["standard", "skip", "residual"] | None = None
    decoder: Literal["standard", "skip"] | None = None
    resample_layers: Literal["block", "conv"] | None = None
    resample_filter: Annotated[tuple[float, ...], AfterValidator(_with_a_sum)] | None = None
    adaptive_scale: bool | None = None
    channels_per_head: Annotated[int, Field(ge=0)] | None = None
    num_heads: Positive | None = None
    num_heads_up: Positive | None = None

    @model_serializer
    def given(self) -> dict[str, Any]:
        """The fields that are given, by name."""
        return {name: value for name, value in self if value is not None}


class UNetConfig(Section):
    """A U-Net of EDM's families (arXiv 2206.00364, Table 7) or OpenAI's (arXiv 2105.05233)."""

    family: Literal["ddpmpp", "ncsnpp", "adm", "openai"] = "ddpmpp"
    model_channels: Positive = 128
    channel_mult: tuple[Positive, ...] = (2, 2, 2)
    channel_mult_emb: Positive = 4
    num_blocks: Positive = 4
    attn_resolutions: tuple[Positive, ...] = (16,)
    fourier_scale: Annotated[float, Field(gt=0)] = 16.0  # NCSN++ only; ECT uses 0.02
    second_time: bool = False  # a second time input, as trajectory models need
    second_time_init: Literal["zero", "random"] = "zero"  # zero: no effect at first; random: as published for CTM
    out_channels: Annotated[int, Field(ge=0)] = 0  # 0 = those of the image; more are dropped (iDDPM's variance)
    overrides: FamilyOverrides = FamilyOverrides()

    @model_validator(mode="after")
    def _check_second_time(self) -> "UNetConfig":
        if self.second_time_init != "zero" and not self.second_time:
            raise ValueError(f"second_time_init is '{self.second_time_init}', but second_time is false: set it to true")
        return self


class EDM2Config(Section):
    """EDM2's magnitude-preserving U-Net (arXiv 2312.02696, Appendix B); the defaults are those of size S at 64x64."""

    family: Literal["edm2"]
    model_channels: Positive = 192
    channel_mult: tuple[Positive, ...] = (1, 2, 3, 4)
    channel_mult_noise: Annotated[int, Field(ge=0)] = 0  # width of the noise embedding; 0 = that of the first level
    channel_mult_emb: Annotated[int, Field(ge=0)] = 0  # width of the final embedding; 0 = that of the widest level
    num_blocks: Positive = 3
    attn_resolutions: tuple[Positive, ...] = (16, 8)
    channels_per_head: Positive = 64
    label_balance: Fraction = 0.5  # share of the class in the sum of noise and class embedding
    concat_balance: Fraction = 0.5  # share of the skip in the decoder's concatenations
    res_balance: Fraction = 0.3  # share of the residual branch in a block's sum
    attn_balance: Fraction = 0.3  # share of attention in its sum
    clip_act: Annotated[float, Field(gt=0)] = 256.0  # bound on activations
    logvar_channels: Annotated[int, Field(ge=0)] = 128  # features of the learned log variance of the loss; 0 = none


class BundleNetworkConfig(Section):
    """The network of the bundle that the first phase begins from; training replaces this section by what stands there."""

    family: Literal["bundle"]


def _network_tag(value: Any) -> str:
    family = value.get("family") if isinstance(value, dict) else getattr(value, "family", None)
    return family if family in ("edm2", "bundle") else "unet"


NetworkConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[EDM2Config, Tag("edm2")] | Annotated[BundleNetworkConfig, Tag("bundle")],
    Discriminator(_network_tag),
]
