"""What is told to ``fastcm convert`` about a checkpoint beside the file, by options or by a preset for a published file."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What names and shapes of a checkpoint do not tell; None where nothing is said.

    weights        which of the sets of weights in a file: "ema", "net", or the relative width of an average, "0.1"
    resolution     side of the images in pixels (OpenAI's network)
    label_dim      number of classes, 0 for none; only checked, as it can be seen
    channels_per_head, num_heads, num_heads_up   widths or numbers of attention heads
    head_major     whether the rows of qkv are ordered (heads, 3, D) instead of (3, heads, D) (OpenAI's network)
    preconditioner, sigma_data, sigma_min        scalings around the network, and their constants
    outer          how jumps are made of a network with a second time, see ``Trajectory``
    sampler, mid_sigmas                          how images are drawn by default
    """

    weights: str | None = None
    resolution: int | None = None
    label_dim: int | None = None
    channels_per_head: int | None = None
    num_heads: int | None = None
    num_heads_up: int | None = None
    head_major: bool | None = None
    preconditioner: str | None = None
    sigma_data: float | None = None
    sigma_min: float | None = None
    outer: Literal["euler", "variance", "euler_variance_mixed"] | None = None
    sampler: Literal["heun", "euler", "consistency", "trajectory"] | None = None
    mid_sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for constants that no preconditioner can have."""
        for name in ("sigma_data", "sigma_min"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # so that NaN is refused too
                raise ConfigError(f"--{name.replace('_', '-')}: expected a finite number above 0, got {value}")

    def over(self, other: "Options") -> "Options":
        """The options of ``other`` where these say nothing."""
        return replace(other, **self.given())

    def given(self) -> dict[str, object]:
        """What is said, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True)
class Preset:
    """The options for a published file, and where its authors say so."""

    layout: Literal["openai", "edm", "edm2"]
    options: Options
    source: str
    second_time: bool = False


_IMAGENET = Options(resolution=64, label_dim=1000, channels_per_head=64, head_major=False, sigma_data=0.5)
_LSUN = Options(resolution=256, label_dim=0, channels_per_head=64, head_major=False, sigma_data=0.5)
_CM = "openai/consistency_models, scripts/launch.sh"
_CTM = "sony/ctm, code/cm/script_util.py; arXiv 2310.02279, section 3"
_KIM = "Kim-Dongjun/ctm-cifar10, cm/script_util.py; arXiv 2310.02279, section 3"


def _diffusion(sizes: Options) -> Options:
    return replace(sizes, preconditioner="edm", sampler="heun")


def _consistency(sizes: Options, *point: int) -> Options:
    """Boundary scalings, and the level between two steps: ``point`` is its index in Karras' grid and the grid's size."""
    middle = [karras_sigmas(point[1])[point[0]].item()] if point else []
    return replace(sizes, preconditioner="edm_boundary", sigma_min=0.002, sampler="consistency", mid_sigmas=tuple(middle))


def _trajectory(sizes: Options) -> Options:
    return replace(_diffusion(sizes), outer="euler", sampler="trajectory")


PRESETS: dict[str, Preset] = {
    "edm_imagenet64_ema": Preset("openai", _diffusion(_IMAGENET), _CM),
    "cd_imagenet64_l2": Preset("openai", _consistency(_IMAGENET, 22, 40), _CM),
    "cd_imagenet64_lpips": Preset("openai", _consistency(_IMAGENET, 22, 40), _CM),
    "ct_imagenet64": Preset("openai", _consistency(_IMAGENET, 106, 201), _CM),
    "edm_bedroom256_ema": Preset("openai", _diffusion(_LSUN), _CM),
    "cd_bedroom256_l2": Preset("openai", _consistency(_LSUN, 18, 40), _CM),
    "cd_bedroom256_lpips": Preset("openai", _consistency(_LSUN, 17, 40), _CM),
    "ct_bedroom256": Preset("openai", _consistency(_LSUN, 67, 151), _CM),
    "edm_cat256_ema": Preset("openai", _diffusion(_LSUN), _CM),
    "cd_cat256_l2": Preset("openai", _consistency(_LSUN), f"{_CM}; no level between two steps is published"),
    "cd_cat256_lpips": Preset("openai", _consistency(_LSUN), f"{_CM}; no level between two steps is published"),
    "ct_cat256": Preset("openai", _consistency(_LSUN, 62, 151), _CM),
    "ctm_imagenet64": Preset("openai", _trajectory(_IMAGENET), _CTM, second_time=True),
    "ctm_cifar10_uncond": Preset("edm", _trajectory(Options(resolution=32, label_dim=0, sigma_data=0.5)), _KIM, True),
    "ctm_cifar10_cond": Preset("edm", _trajectory(Options(resolution=32, label_dim=10, sigma_data=0.5)), _KIM, True),
    "ect_imagenet64": Preset(
        "edm2",
        Options(
            resolution=64, label_dim=1000, channels_per_head=64, preconditioner="edm", sigma_data=0.5, sampler="consistency",
            mid_sigmas=(1.526,),
        ),
        "locuslab/ect, branch imgnet, run_imgnet_ecm.sh; arXiv 2406.14548",
    ),
}  # fmt: skip


def find_preset(name: str) -> Preset | None:
    """The preset of this name, None for "". Raises ConfigError naming the presets there are."""
    if name and name not in PRESETS:
        raise ConfigError(f"--preset: there is none called '{name}'; choose one of {', '.join(PRESETS)}")
    return PRESETS.get(name)


def preset_table() -> str:
    """All presets, two lines each: what it says, and where that is from."""
    width = max(map(len, PRESETS))
    return "\n".join(
        f"{name:<{width}}  {describe(preset)}\n{'':<{width}}    {preset.source}" for name, preset in PRESETS.items()
    )


def describe(preset: Preset) -> str:
    """What a preset says, in words."""
    options = preset.options
    words = [preset.layout, f"{options.resolution}x{options.resolution}", f"{options.label_dim} classes"]
    words += [f"{options.preconditioner} scalings", str(options.sampler)]
    words += [f"between steps {', '.join(f'{sigma:.4g}' for sigma in options.mid_sigmas)}"] if options.mid_sigmas else []
    words += [f"{options.outer} jumps"] if preset.second_time else []
    return ", ".join(words)
