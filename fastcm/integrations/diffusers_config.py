"""The configuration files of a ``ConsistencyModelPipeline`` of diffusers, as far as fastcm has the same network."""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.errors import ConfigError
from fastcm.nn.blocks import Block
from fastcm.nn.families import FAMILIES
from fastcm.nn.network import Network
from fastcm.nn.unet import UNet

FAMILY = "openai"
SIGMA_MAX = 80.0  # where fastcm.sample begins
SCALE_SHIFT, ADDEND = "scale_shift", "default"  # what the embedding does in a block
ATTENTION, NO_ATTENTION = "Attn", "Resnet"
DOWN = {ATTENTION: "AttnDownBlock2D", NO_ATTENTION: "ResnetDownsampleBlock2D"}
UP = {ATTENTION: "AttnUpBlock2D", NO_ATTENTION: "ResnetUpsampleBlock2D"}
# What a Family may say differently without changing what the network computes, or what is read off the network itself.
_FREE = {"init", "fourier_scale", "channels_per_head", "num_heads", "num_heads_up", "adaptive_scale"}
INSTEAD = "use the Hugging Face layout instead (fastcm export --format hf)"


def _only(*allowed: Any) -> AfterValidator:
    """Accepts the values that the OpenAI family of fastcm has."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"fastcm has this network with {' or '.join(map(repr, allowed))} only")
        return value

    return AfterValidator(check)


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class UNet2DConfig(_Config):
    """unet/config.json of a ``UNet2DModel`` that is OpenAI's network; the defaults are those of diffusers.

    A value that this network does not have is refused when it is read, also where it is the default.
    """

    sample_size: Annotated[int, Field(gt=0)]
    in_channels: Annotated[int, Field(gt=0)] = 3
    out_channels: int = 3
    center_input_sample: Annotated[bool, _only(False)] = False
    time_embedding_type: Annotated[str, _only("positional")] = "positional"
    time_embedding_dim: Annotated[int, Field(gt=0)] | None = None
    freq_shift: Annotated[float, _only(0)] = 0
    flip_sin_to_cos: Annotated[bool, _only(True)] = True
    down_block_types: tuple[Annotated[str, _only(*DOWN.values())], ...] = ("DownBlock2D",)
    mid_block_type: Annotated[str | None, _only("UNetMidBlock2D")] = "UNetMidBlock2D"
    up_block_types: tuple[Annotated[str, _only(*UP.values())], ...] = ("UpBlock2D",)
    block_out_channels: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (224, 448, 672, 896)
    layers_per_block: Annotated[int, Field(gt=0)] = 2
    mid_block_scale_factor: Annotated[float, _only(1)] = 1
    downsample_padding: int = 1  # of plain strided convolutions, which this network lacks
    downsample_type: Annotated[str, _only("resnet")] = "conv"
    upsample_type: Annotated[str, _only("resnet")] = "conv"
    dropout: float = 0.0  # of training in diffusers; fastcm's is part of a phase
    act_fn: Annotated[str, _only("silu", "swish")] = "silu"
    attention_head_dim: Annotated[int, Field(gt=0)] | None = 8
    norm_num_groups: Annotated[int, _only(32)] = 32
    attn_norm_num_groups: Annotated[int | None, _only(32, None)] = None
    norm_eps: Annotated[float, _only(FAMILIES[FAMILY].eps)] = 1e-5
    resnet_time_scale_shift: Annotated[str, _only(SCALE_SHIFT, ADDEND)] = ADDEND
    add_attention: bool = True
    class_embed_type: Annotated[str | None, _only(None)] = None
    num_class_embeds: Annotated[int, Field(gt=0)] | None = None
    num_train_timesteps: int | None = None  # of learned time embeddings, which this network lacks

    def network(self) -> UNetConfig:
        """The same network as a configuration of fastcm; raises ConfigError naming what cannot be represented."""
        base, levels = self.block_out_channels[0], len(self.block_out_channels)
        attends = [name == DOWN[ATTENTION] for name in self.down_block_types]
        up_types = tuple(UP[ATTENTION if attention else NO_ATTENTION] for attention in reversed(attends))
        _require(len(attends) == levels, "down_block_types", self.down_block_types, f"one for each of {levels} levels")
        _require(self.up_block_types == up_types, "up_block_types", self.up_block_types, f"{up_types}, as the encoder has")
        whole = all(width % base == 0 for width in self.block_out_channels)
        _require(whole, "block_out_channels", self.block_out_channels, f"multiples of the first width {base}")
        time_width = self.time_embedding_dim or 4 * base
        _require(time_width % base == 0, "time_embedding_dim", time_width, f"a multiple of the first width {base}")
        _require(self.out_channels == self.in_channels, "out_channels", self.out_channels, f"in_channels {self.in_channels}")
        self._check_attention([width for width, attention in zip(self.block_out_channels, attends, strict=True) if attention])
        return UNetConfig(
            family=FAMILY,
            model_channels=base,
            channel_mult=tuple(width // base for width in self.block_out_channels),
            channel_mult_emb=time_width // base,
            num_blocks=self.layers_per_block,
            attn_resolutions=tuple(self.sample_size >> level for level in range(levels) if attends[level]),
            overrides=self._overrides(),
        )

    def _check_attention(self, widths: list[int]) -> None:
        size, bottom = self.attention_head_dim or 1, self.block_out_channels[-1]
        for width in [*widths, *([bottom] if self.add_attention else [])]:
            _require(width % size == 0, "attention_head_dim", size, f"heads that divide the {width} channels they share")
        _require(self.add_attention or size > bottom, "add_attention", self.add_attention, f"True at {bottom} channels")
        groups = self.attn_norm_num_groups or (None if self.resnet_time_scale_shift == SCALE_SHIFT else self.norm_num_groups)
        _require(groups == 32 or not self.add_attention, "attn_norm_num_groups", self.attn_norm_num_groups, "32")

    def _overrides(self) -> FamilyOverrides:
        """Where this network differs from the family's own values."""
        given = {
            "channels_per_head": self.attention_head_dim or 0,
            "adaptive_scale": self.resnet_time_scale_shift == SCALE_SHIFT,
        }
        return FamilyOverrides(**{name: value for name, value in given.items() if value != getattr(FAMILIES[FAMILY], name)})


class SchedulerConfig(_Config):
    """scheduler/scheduler_config.json of a ``CMStochasticIterativeScheduler``; the defaults are those of diffusers.

    num_train_timesteps, sigma_min, sigma_max and rho make the grid that the pipeline's timesteps are indices of;
    sigma_min and sigma_data are also those of the boundary scalings.
    """

    num_train_timesteps: Annotated[int, Field(gt=1)] = 40
    sigma_min: Annotated[float, Field(gt=0, lt=SIGMA_MAX, allow_inf_nan=False)] = 0.002
    sigma_max: Annotated[float, _only(SIGMA_MAX)] = SIGMA_MAX
    sigma_data: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    s_noise: Annotated[float, _only(1)] = 1.0
    rho: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 7.0
    clip_denoised: bool = True

    def sigmas(self) -> tuple[float, ...]:
        """The noise level of each timestep 0, 1, ... num_train_timesteps - 1, from sigma_max down to sigma_min.

        sigma_k = (sigma_max^(1/rho) + k / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho; arXiv 2206.00364, Eq. 5.
        """
        return tuple(karras_sigmas(self.num_train_timesteps, self.sigma_min, self.sigma_max, self.rho)[:-1].tolist())


def pipeline_timesteps(mid_sigmas: tuple[float, ...], scheduler: SchedulerConfig | None = None) -> list[int]:
    """What to give ``ConsistencyModelPipeline`` as timesteps so that it goes through these noise levels.

    The pipeline knows the levels of ``SchedulerConfig.sigmas`` only and wants their indices in descending order, though
    it walks them from the largest level down: [22, 0] is sigma_max, then level 22. The nearest level is taken.
    Raises ConfigError where two steps fall on the same level; a scheduler with more num_train_timesteps tells them apart.
    """
    grid = (scheduler or SchedulerConfig()).sigmas()
    steps = [min(range(len(grid)), key=lambda k: abs(grid[k] - sigma)) for sigma in (grid[0], *mid_sigmas)]
    if steps != sorted(set(steps)):
        raise ConfigError(
            f"mid_sigmas {list(mid_sigmas)} fall on timesteps {steps[1:]} of a grid of {len(grid)}, which must increase "
            "from above 0; take noise levels that descend, and a larger num_train_timesteps"
        )
    return steps[::-1]


def unet_config(net: Network) -> UNet2DConfig:
    """The configuration of a ``UNet2DModel`` that computes what ``net`` does.

    Raises ConfigError naming what differs where no such model exists.
    """
    unet = _check_topology(net)
    widths = [unet.dec[f"{r}x{r}_block0"].out_channels for r in unet.resolutions]
    kinds = [ATTENTION if unet.enc[f"{r}x{r}_block0"].num_heads else NO_ATTENTION for r in unet.resolutions]
    if widths[0] != unet.map_layer0.weight.shape[1]:
        raise _refusal(f"channel_mult[0] is {widths[0] // unet.map_layer0.weight.shape[1]} instead of 1")
    bottom = unet.dec[f"{unet.resolutions[-1]}x{unet.resolutions[-1]}_in0"]
    return UNet2DConfig(
        sample_size=unet.img_resolution,
        in_channels=unet.img_channels,
        out_channels=unet.out_channels,
        time_embedding_dim=unet.emb_channels,
        down_block_types=tuple(DOWN[kind] for kind in kinds),
        up_block_types=tuple(UP[kind] for kind in reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=unet.num_blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=_head_channels(unet),
        attn_norm_num_groups=32,
        resnet_time_scale_shift=SCALE_SHIFT if unet.family.adaptive_scale else ADDEND,
        add_attention=bottom.num_heads > 0,
        num_class_embeds=unet.label_dim or None,
    )


def _head_channels(unet: UNet) -> int | None:
    """The width of all attention heads; None where each layer has one head."""
    attending = [block for block in unet.modules() if isinstance(block, Block) and block.num_heads]
    sizes = sorted({block.out_channels // block.num_heads for block in attending})
    if len(sizes) < 2:
        return sizes[0] if sizes else unet.family.channels_per_head or None
    if all(block.num_heads == 1 for block in attending):
        return None
    raise _refusal(f"its attention heads are {' and '.join(map(str, sizes))} channels wide, diffusers has one width for all")


def _check_topology(net: Network) -> UNet:
    """The network, if it is OpenAI's; raises ConfigError naming the first part that UNet2DModel does not have."""
    if not isinstance(net, UNet):
        raise _refusal(f"the network is a {type(net).__name__}, which diffusers does not have")
    family, expected = net.family, FAMILIES[FAMILY]
    names = [field.name for field in fields(expected) if field.name not in _FREE]
    found = [name for name in names if getattr(family, name) != getattr(expected, name)]
    if found:
        pairs = [f"{name} {getattr(family, name)!r} instead of {getattr(expected, name)!r}" for name in found]
        raise _refusal(f"the network is not of the {FAMILY} family: {', '.join(pairs)}")
    if net.second_time:
        raise _refusal("the network takes a second time (second_time)")
    if net.augment_dim:
        raise _refusal(f"the network takes {net.augment_dim} augmentation labels (augment_dim)")
    if net.out_channels != net.img_channels:
        raise _refusal(f"the network has {net.out_channels} output channels for {net.img_channels} of the image")
    return net


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"cannot be written for diffusers: {reason}; {INSTEAD}")


def _require(holds: bool, key: str, found: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {found!r}, but fastcm has this network with {expected} only")
