"""State dicts of the official EDM networks (arXiv 2206.00364) to and from those of ``fastcm.nn.UNet``.

Names and shapes agree except in two places. Official attention interleaves q, k and v: row (h D + c) 3 + {q, k, v} of
qkv is channel c of head h; ours are ordered (3, heads, D). And official resampling layers store their filter.
"""

import math
import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.errors import CheckpointError
from fastcm.io.layout import check_state, to_interleaved, to_major
from fastcm.io.unet_facts import UNetFacts, attention_heads, merged_overrides, shape_of, whole_multiple
from fastcm.nn.families import FAMILIES
from fastcm.nn.layers import Conv, Resample
from fastcm.nn.unet import UNet

_FILTER = "resample_filter"
_FOURIER_SCALES = (16.0, 0.02)  # EDM, ECT


def from_edm(state: Mapping[str, Tensor], unet: UNet, *, drop: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What ``unet.load_state_dict`` takes, from a state dict under official names (without the leading "model.").

    Neither ``state`` nor ``unet`` is changed; values keep their dtype. ``drop`` lists prefixes of entries to leave out
    on purpose, such as "map_augment." where a network is tuned without augmentation labels.
    Raises CheckpointError naming the key that is missing, unknown or of another shape, or a filter of another family.
    """
    state = {name: value for name, value in state.items() if not name.startswith(drop)}
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    filters = _filters(unet)
    check_state(state, expected | {name: value.shape for name, value in filters.items()})
    for name, value in filters.items():
        if not torch.allclose(state[name].to("cpu", value.dtype), value):
            raise CheckpointError(f"{name} is not the filter this network resamples with: the checkpoint is of another family")
    heads = attention_heads(unet)
    return {name: to_major(state[name], heads[name]) if name in heads else state[name] for name in expected}


def to_edm(state: Mapping[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The official state dict (without the leading "model.") with the values of ``state``, a state dict of ``unet``.

    Raises CheckpointError naming the key that is missing, unknown or of another shape.
    """
    check_state(state, {name: value.shape for name, value in unet.state_dict().items()})
    heads = attention_heads(unet)
    official = {name: to_interleaved(value, heads[name]) if name in heads else value for name, value in state.items()}
    return official | _filters(unet)


def describe_edm(state: Mapping[str, Float[Tensor, "..."]], given: FamilyOverrides | None = None) -> UNetFacts:
    """What names and shapes of an official state dict (without the leading "model.") tell of its network.

    They cannot tell the number of heads, which ``given`` has where it is not the family's. The scale of Fourier frequencies
    is only needed for fresh weights: EDM's or ECT's, whichever is nearer to the frequencies found.
    Raises CheckpointError for a state dict that is not of this kind, and where ``given`` contradicts it.
    """
    levels = _levels(state)
    family = "adm" if "out_conv.weight" in state else "ncsnpp" if "map_noise.freqs" in state else "ddpmpp"
    noise_channels, blocks = shape_of(state, "map_layer0.weight", ndim=2)[1], [f"enc.{level}_block0" for level in levels]
    stem_channels, img_channels = shape_of(state, f"enc.{levels[0]}_conv.weight", ndim=2)[:2]
    model_channels = noise_channels if family == "adm" else stem_channels
    widths = [shape_of(state, f"{block}.conv0.weight")[0] for block in blocks]
    seen = {"channel_mult_noise": whole_multiple(noise_channels, model_channels, "map_layer0.weight")}
    seen |= {"adaptive_scale": shape_of(state, f"{blocks[0]}.affine.weight")[0] == 2 * widths[0]}
    seen |= _pyramids(state, levels) | _filter(state)
    out_conv = "out_conv.weight" if family == "adm" else f"dec.{levels[0]}_aux_conv.weight"
    out_channels = shape_of(state, out_conv)[0]
    network = UNetConfig(
        family=family,
        model_channels=model_channels,
        channel_mult=tuple(whole_multiple(width, model_channels, block) for width, block in zip(widths, blocks, strict=True)),
        channel_mult_emb=whole_multiple(shape_of(state, "map_layer0.weight")[0], model_channels, "map_layer0.weight"),
        num_blocks=sum(name.startswith(f"enc.{levels[0]}_block") and name.endswith("conv0.weight") for name in state),
        attn_resolutions=tuple(_side(level) for level in levels if f"enc.{level}_block0.qkv.weight" in state),
        fourier_scale=_fourier_scale(state, FAMILIES[family].fourier_scale),
        second_time="map_layer0_s.weight" in state,
        out_channels=0 if out_channels == img_channels else out_channels,
        overrides=merged_overrides(family, seen, given or FamilyOverrides()),
    )
    label_dim, augment_dim = (
        shape_of(state, name, ndim=2)[1] if name in state else 0 for name in ("map_label.weight", "map_augment.weight")
    )
    return UNetFacts(network, (img_channels, _side(levels[0]), _side(levels[0])), label_dim, augment_dim)


def _levels(state: Mapping[str, Tensor]) -> list[str]:
    """The levels that blocks of the encoder stand on, as "32x32", from full to lowest resolution."""
    found = {match[1] for name in state if (match := re.match(r"enc\.(\d+x\d+)_block0\.", name))}
    if not found:
        raise CheckpointError("the checkpoint has no enc.*_block0: it is not of EDM's U-Nets")
    return sorted(found, key=_side, reverse=True)


def _side(level: str) -> int:
    return int(level.partition("x")[0])


def _pyramids(state: Mapping[str, Tensor], levels: list[str]) -> dict[str, str]:
    """The kinds of image pyramid beside encoder and decoder."""
    below = levels[1:]
    kinds = {"residual": "aux_residual", "skip": "aux_skip"}
    encoder = [kind for kind, layer in kinds.items() if any(f"enc.{level}_{layer}.weight" in state for level in below)]
    decoder = "skip" if any(f"dec.{level}_aux_conv.weight" in state for level in below) else "standard"
    return {"encoder": encoder[0] if encoder else "standard", "decoder": decoder}


def _filter(state: Mapping[str, Tensor]) -> dict[str, tuple[float, ...]]:
    """The taps of the stored filters, with the smallest as 1; nothing for a network of one level, which has none."""
    stored = [name for name in state if name.endswith(_FILTER)]
    if not stored:
        return {}
    shape_of(state, stored[0], ndim=2)
    taps_K = state[stored[0]].float().flatten(0, -2).sum(0)
    if not taps_K.numel() or not ((taps_K > 0) & taps_K.isfinite()).all():
        raise CheckpointError(f"{stored[0]} is no filter to resample with: it needs taps above 0")
    return {"resample_filter": tuple(round(tap, 3) for tap in (taps_K / taps_K.min()).tolist())}


def _fourier_scale(state: Mapping[str, Tensor], default: float) -> float:
    if "map_noise.freqs" not in state:
        return default
    rms = state["map_noise.freqs"].float().square().mean().sqrt().item()
    return min(_FOURIER_SCALES, key=lambda scale: abs(math.log(max(rms, 1e-9) / scale)))


def _filters(unet: UNet) -> dict[str, Tensor]:
    """The filter buffers of the official network by name: [1, 1, K, K], the outer product with sum 1."""
    taps = {}
    for name, module in unet.named_modules(remove_duplicate=False):
        if isinstance(module, Conv) and module.resample is not None:
            taps[f"{name}.{_FILTER}"] = module.resample.filter
        elif isinstance(module, Resample) and not name.endswith(".resample"):
            taps[f"{name}.{_FILTER}"] = module.filter
    return {name: _outer(torch.tensor(filter, dtype=torch.float32)) for name, filter in taps.items()}


def _outer(taps_K: Tensor) -> Tensor:
    return (torch.outer(taps_K, taps_K) / taps_K.sum().square())[None, None]
