"""State dicts of OpenAI's U-Net (arXiv 2105.05233, 2303.01469; with a second time 2310.02279) to and from ``fastcm.nn.UNet``.

The official network numbers its layers in the order of use. Other differences: class vectors are the rows of an embedding
table; the 1x1 convolutions around attention may be 1-D; and the rows of qkv are ordered (3, heads, D) as ours, or
(heads, 3, D) where the network was trained with "legacy" attention, which names and shapes do not show.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields

from jaxtyping import Float
from torch import Tensor

from fastcm.config import FamilyOverrides, UNetConfig
from fastcm.errors import CheckpointError
from fastcm.io.layout import check_state
from fastcm.io.unet_facts import UNetFacts, attention_heads, merged_overrides, shape_of, whole_multiple
from fastcm.nn.blocks import Block, PlainDown
from fastcm.nn.families import FAMILIES
from fastcm.nn.unet import UNet

_FREE = {"adaptive_scale", "resample_layers", "channels_per_head", "num_heads", "num_heads_up", "init"}
_EMBEDDING = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_layer0_s": "time_embed_s.0",
    "map_layer1_s": "time_embed_s.2",
    "map_label": "label_emb",
}
_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "affine_s": "emb_layers_s.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def from_openai(
    state: Mapping[str, Float[Tensor, "..."]], unet: UNet, *, head_major: bool = False
) -> dict[str, Float[Tensor, "..."]]:
    """What ``unet.load_state_dict`` takes, from an official state dict. head_major: qkv is ordered (heads, 3, D).

    Neither ``state`` nor ``unet`` is changed; values keep their dtype. Raises CheckpointError naming the key that is
    missing, unknown or of another shape, and for a network that OpenAI's layout has no names for.
    """
    names, ours = _names(unet), unet.state_dict()
    heads, points = attention_heads(unet), _pointwise(unet)
    state = dict(state)
    for name in points:
        value = state.get(names[name])
        if value is not None and value.ndim == 3:
            state[names[name]] = value[..., None]
    check_state(state, {names[name]: _turned(name, value).shape for name, value in ours.items()})
    found = {name: _turned(name, state[names[name]]) for name in ours}
    return {name: _swapped(value, heads[name], 3) if head_major and name in heads else value for name, value in found.items()}


def to_openai(
    state: Mapping[str, Float[Tensor, "..."]], unet: UNet, *, head_major: bool = False, conv1d: bool = False
) -> dict[str, Float[Tensor, "..."]]:
    """The official state dict with the values of ``state``, a state dict of ``unet``.

    head_major: order qkv (heads, 3, D), as networks with "legacy" attention read it. conv1d: shape the weights around
    attention [O, I, 1], as guided-diffusion has them, instead of [O, I, 1, 1].
    Raises CheckpointError naming the key that is missing, unknown or of another shape, and for a network that OpenAI's
    layout has no names for.
    """
    names, heads, points = _names(unet), attention_heads(unet), _pointwise(unet)
    check_state(state, {name: value.shape for name, value in unet.state_dict().items()})
    official = {}
    for name, value in state.items():
        if head_major and name in heads:
            value = _swapped(value, 3, heads[name])
        if conv1d and name in points:
            value = value[..., 0]
        official[names[name]] = _turned(name, value).contiguous()
    return official


def describe_openai(
    state: Mapping[str, Float[Tensor, "..."]], img_resolution: int, given: FamilyOverrides | None = None
) -> UNetFacts:
    """What names and shapes of an official state dict tell of its network, which works at ``img_resolution``.

    They cannot tell the number of heads: ``given`` has channels_per_head (by default 64), or 0 there and num_heads and
    num_heads_up. Raises CheckpointError for a state dict that is not of this kind, and where ``given`` contradicts it.
    """
    base = shape_of(state, "time_embed.0.weight", ndim=2)[1]
    num_blocks, plain, num_levels = _levels(state)
    starts = [1 + level * (num_blocks + 1) for level in range(num_levels)]
    widths = [shape_of(state, f"input_blocks.{start}.0.out_layers.3.weight")[0] for start in starts]
    attends = [f"input_blocks.{start}.1.qkv.weight" in state for start in starts]
    if img_resolution % 2 ** (num_levels - 1):
        raise CheckpointError(
            f"the checkpoint has {num_levels} levels, but {img_resolution} pixels cannot be halved that often"
        )
    adaptive = shape_of(state, "input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0]
    overrides = merged_overrides(
        "openai", {"adaptive_scale": adaptive, "resample_layers": "conv" if plain else "block"}, given or FamilyOverrides()
    )
    middle = "middle_block.1.qkv.weight" in state  # a network that is narrower than one head has no attention there
    places = zip([*widths, widths[-1]], [*attends, middle], strict=True)
    _check_heads(overrides, {width for width, attention in places if attention})
    out_channels, img_channels = shape_of(state, "out.2.weight")[0], shape_of(state, "input_blocks.0.0.weight", ndim=2)[1]
    network = UNetConfig(
        family="openai",
        model_channels=base,
        channel_mult=tuple(whole_multiple(width, base, "input_blocks") for width in widths),
        channel_mult_emb=whole_multiple(shape_of(state, "time_embed.0.weight")[0], base, "time_embed.0.weight"),
        num_blocks=num_blocks,
        attn_resolutions=tuple(img_resolution >> level for level, attention in enumerate(attends) if attention),
        second_time="time_embed_s.0.weight" in state,
        out_channels=0 if out_channels == img_channels else out_channels,
        overrides=overrides,
    )
    label_dim = shape_of(state, "label_emb.weight")[0] if "label_emb.weight" in state else 0
    return UNetFacts(network, (img_channels, img_resolution, img_resolution), label_dim, 0)


def _levels(state: Mapping[str, Tensor]) -> tuple[int, bool, int]:
    """(blocks per level, whether resolution changes in plain convolutions, number of levels), from the decoder's names."""
    blocks = {int(match[1]) for name in state if (match := re.match(r"output_blocks\.(\d+)\.", name))}
    if not blocks:
        raise CheckpointError("the checkpoint has no output_blocks.*: it is not of OpenAI's U-Net")
    plain = [k for k in blocks for part in (1, 2) if f"output_blocks.{k}.{part}.conv.weight" in state]
    residual = [k for k in blocks for part in (1, 2) if f"output_blocks.{k}.{part}.in_layers.0.weight" in state]
    ups, num_levels = sorted(plain + residual), len(plain) + len(residual) + 1
    per_level = ups[0] + 1 if ups else len(blocks)
    if per_level < 2 or len(blocks) != per_level * num_levels:
        raise CheckpointError(f"the checkpoint has {len(blocks)} output_blocks, which do not divide into {num_levels} levels")
    return per_level - 1, bool(plain), num_levels


def _check_heads(overrides: FamilyOverrides, widths: set[int]) -> None:
    per_head = FAMILIES["openai"].channels_per_head if overrides.channels_per_head is None else overrides.channels_per_head
    for width in sorted(widths):
        if per_head and width % per_head:
            raise CheckpointError(f"attention is {width} channels wide, no multiple of channels_per_head {per_head}")


def _names(unet: UNet) -> dict[str, str]:
    """The official name of each parameter of ``unet``."""
    differing = [field.name for field in fields(unet.family) if _differs(unet, field.name)]
    if differing or unet.augment_dim:
        what = differing[0] if differing else "augment_dim"
        raise CheckpointError(f"OpenAI's layout has no place for a network of this {what}; it takes the family 'openai'")
    modules = _EMBEDDING | dict(_encoder_names(unet)) | dict(_decoder_names(unet))
    modules |= {"out_norm": "out.0", "out_conv": "out.2"}
    split = (name.rpartition(".") for name in unet.state_dict())
    return {f"{module}.{leaf}": f"{modules[module]}.{leaf}" for module, _, leaf in split}


def _differs(unet: UNet, field: str) -> bool:
    return field not in _FREE and getattr(unet.family, field) != getattr(FAMILIES["openai"], field)


def _encoder_names(unet: UNet) -> Iterator[tuple[str, str]]:
    for position, (key, module) in enumerate(unet.enc.items()):
        yield from _layer_names(f"enc.{key}", module, f"input_blocks.{position}", 0)


def _decoder_names(unet: UNet) -> Iterator[tuple[str, str]]:
    position, part = -1, 0
    for key, module in unet.dec.items():
        kind = key.rpartition("_")[2]
        if kind in ("in0", "in1"):
            yield from _layer_names(f"dec.{key}", module, "middle_block", 0 if kind == "in0" else 2)
            continue
        if kind != "up":  # a layer that doubles the resolution ends the group of the block before it
            position, part = position + 1, 0
        yield from _layer_names(f"dec.{key}", module, f"output_blocks.{position}", part)
        part = 2 if isinstance(module, Block) and module.num_heads else 1


def _layer_names(ours: str, module: object, group: str, part: int) -> Iterator[tuple[str, str]]:
    """The pairs of names of one layer that stands at ``part`` of its group, with its attention after it."""
    if isinstance(module, Block):
        yield from ((f"{ours}.{mine}", f"{group}.{part}.{theirs}") for mine, theirs in _BLOCK.items())
        yield from ((f"{ours}.{mine}", f"{group}.{part + 1}.{theirs}") for mine, theirs in _ATTENTION.items())
    elif isinstance(module, PlainDown):
        yield ours, f"{group}.{part}.op"
    else:
        yield ours, f"{group}.{part}" if group.startswith("input") else f"{group}.{part}.conv"


def _pointwise(unet: UNet) -> set[str]:
    """The weights of the 1x1 convolutions around attention."""
    blocks = (name for name, module in unet.named_modules() if isinstance(module, Block) and module.num_heads)
    return {f"{name}.{layer}.weight" for name in blocks for layer in ("qkv", "proj")}


def _turned(name: str, value: Tensor) -> Tensor:
    return value.t() if name == "map_label.weight" else value


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows ordered (outer, inner, D) to (inner, outer, D)."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
