"""What names and shapes of an EDM2 state dict (arXiv 2312.02696), and the arguments saved beside it, tell of its network."""

import math
import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fastcm.config import EDM2Config
from fastcm.errors import CheckpointError
from fastcm.io.unet_facts import shape_of, whole_multiple

SIZES = {128: "XS", 192: "S", 256: "M", 320: "L", 384: "XL", 448: "XXL"}  # by model_channels
UNSEEN = ("channels_per_head", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act")
BOX = [1, 1]


def describe_edm2(
    state: Mapping[str, Float[Tensor, "..."]], arguments: Mapping[str, Any]
) -> tuple[EDM2Config, tuple[int, int, int], int]:
    """(network, shape of the images, number of classes) of a state dict under official names ("unet.enc...").

    ``arguments`` are those that the official network was constructed with, as far as they are known; of them only what
    names and shapes do not tell is used. model_channels is the largest common divisor of all widths.
    Raises CheckpointError for a state dict of another kind, and for arguments that fastcm has no counterpart for.
    """
    sides = {int(match[1]) for name in state if (match := re.match(r"unet\.enc\.(\d+)x\1_block0\.", name))}
    if not sides:
        raise CheckpointError("the checkpoint has no unet.enc.*_block0: it is not of EDM2's U-Nets")
    levels = [f"unet.enc.{side}x{side}" for side in sorted(sides, reverse=True)]
    widths = [shape_of(state, f"{level}_block0.conv_res0.weight")[0] for level in levels]
    emb, noise = shape_of(state, "unet.emb_noise.weight", ndim=2)[:2]
    base = math.gcd(noise, emb, *widths)
    seen: dict[str, Any] = {
        "model_channels": base,
        "channel_mult": tuple(width // base for width in widths) if base else (),
        "channel_mult_noise": 0 if noise == widths[0] else whole_multiple(noise, base, "unet.emb_noise.weight"),
        "channel_mult_emb": 0 if emb == max(widths) else whole_multiple(emb, base, "unet.emb_noise.weight"),
        "num_blocks": sum(name.startswith(f"{levels[0]}_block") and name.endswith("conv_res0.weight") for name in state),
        "attn_resolutions": tuple(
            int(level.rpartition("x")[2]) for level in levels if f"{level}_block0.attn_qkv.weight" in state
        ),
        "logvar_channels": shape_of(state, "logvar_fourier.freqs")[0] if "logvar_fourier.freqs" in state else 0,
    }
    channels = shape_of(state, f"{levels[0]}_conv.weight", ndim=2)[1] - 1  # beside the channel of ones
    label_dim = shape_of(state, "unet.emb_label.weight", ndim=2)[1] if "unet.emb_label.weight" in state else 0
    side = max(sides)
    return _config(seen | _unseen(arguments)), (channels, side, side), label_dim


def _config(values: Mapping[str, Any]) -> EDM2Config:
    try:
        return EDM2Config(family="edm2", **values)
    except ValueError as error:
        raise CheckpointError(f"it describes a network that cannot be: {' '.join(str(error).split())[:300]}") from None


def _unseen(arguments: Mapping[str, Any]) -> dict[str, float]:
    filter = arguments.get("resample_filter", BOX)
    if filter != BOX:
        raise CheckpointError(f"its network resamples with the filter {filter!r:.99}, but fastcm's EDM2 network only has {BOX}")
    found = {name: arguments[name] for name in UNSEEN if name in arguments}
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise CheckpointError(f"its network was made with a {name} that is a {type(value).__name__}, expected a number")
    return {name: value if name == "channels_per_head" else float(value) for name, value in found.items()}
