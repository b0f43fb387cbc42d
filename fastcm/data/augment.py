"""Augmentation that does not leak into what is generated: each transform is told to the network as a label.

arXiv 2206.00364, appendix F.2, Table 6; the transforms come from arXiv 2006.06676. Parameters are a pure function of
given draws; the draws are a pure function of (seed, global sample index).
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastcm.data.warp import inverse_affine, warp
from fastcm.errors import ConfigError
from fastcm.random import Stream


class Draw(NamedTuple):
    """One random quantity per image: uniform in [0, 1), standard normal, or integer in [0, high)."""

    kind: Literal["uniform", "normal", "integer"]
    size: int = 1
    high: int = 0


GATE = Draw("uniform")
# In pipe order. The place of a draw in this table is its place in the random stream, whatever is switched on: add new
# ones at the end.
DRAWS: dict[str, dict[str, Draw]] = {
    "xflip": {"value": Draw("integer", high=2), "gate": GATE},
    "yflip": {"value": Draw("integer", high=2), "gate": GATE},
    "rotate_int": {"value": Draw("integer", high=4), "gate": GATE},
    "translate_int": {"value": Draw("uniform", size=2), "gate": GATE},
    "scale": {"value": Draw("normal"), "gate": GATE},
    "rotate_frac": {"value": Draw("uniform"), "gate": GATE},
    "aniso": {"value": Draw("normal"), "angle": Draw("uniform"), "gate": GATE, "angle_gate": GATE},
    "translate_frac": {"value": Draw("normal", size=2), "gate": GATE},
    "brightness": {"value": Draw("normal"), "gate": GATE},
    "contrast": {"value": Draw("normal"), "gate": GATE},
    "lumaflip": {"value": Draw("integer", high=2), "gate": GATE},
    "hue": {"value": Draw("uniform"), "gate": GATE},
    "saturation": {"value": Draw("normal"), "gate": GATE},
}
TWO_LABELS = {"rotate_int", "translate_int", "rotate_frac", "aniso", "translate_frac", "hue"}
GEOMETRIC = {"scale", "rotate_frac", "aniso", "translate_frac"}
COLOURS = {"brightness", "contrast", "lumaflip", "hue", "saturation"}

Parameters = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AugmentPipe:
    """EDM's augmentation pipe: each enabled transform acts with probability min(1, strength p).

    p: overall probability. The strengths ``xflip`` .. ``saturation`` multiply it; 0 switches a transform off.
    translate_int_max, translate_frac_std: relative to the image side; scale_std, aniso_std, contrast_std, saturation_std:
    of log2 of the factor; rotate_frac_max, hue_max: 1 is the full circle; brightness_std: in units of the [-1, 1] range.
    Images are fp32 [N, C, H, W] with 1 or 3 channels; grey images keep only what changes brightness.
    arXiv 2206.00364, appendix F.2. Raises ConfigError for a negative value.
    """

    p: float = 1.0
    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    translate_int_max: float = 0.125
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1.0
    saturation_std: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) >= 0:
                raise ConfigError(f"augment.{field.name} is {value}, expected 0 or more")

    @classmethod
    def edm_cifar10(cls, p: float = 0.12) -> "AugmentPipe":
        """The pipe of EDM's CIFAR-10 models: 9 labels; x-flips act always. arXiv 2206.00364, Table 7."""
        return cls(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)

    @property
    def enabled(self) -> tuple[str, ...]:
        """The transforms that are switched on, in pipe order."""
        return tuple(name for name in DRAWS if getattr(self, name) > 0)

    @property
    def label_dim(self) -> int:
        """Width of the augmentation label."""
        return sum(2 if name in TWO_LABELS else 1 for name in self.enabled)

    def __call__(
        self, images_NCHW: Float[Tensor, "N C H W"], index_N: Int64[Tensor, " N"], seed: int
    ) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N label_dim"]]:
        """Augment each image with the random numbers of its global sample index; returns images and labels."""
        return self.apply(images_NCHW, self.draw(index_N, seed))

    def draw(self, index_N: Int64[Tensor, " N"], seed: int) -> Parameters:
        """The draws of the enabled transforms by name ("aniso.angle"), each [N] or [N, 2], from Stream(seed, "augment")."""
        stream = Stream(seed, "augment")
        tables = {
            "normal": stream.normal(index_N, (_slots("normal"),), draw=1),
            "uniform": stream.uniform(index_N, (_slots("uniform"),), draw=0),
        }
        places = _places()
        draws = {name: (DRAWS[name.split(".")[0]][name.split(".")[1]], places[name]) for name in self.draw_names()}
        return {name: _take(tables, spec, place) for name, (spec, place) in draws.items()}

    def draw_names(self) -> list[str]:
        """The names of the draws, in the order in which the transforms use them."""
        return [f"{name}.{part}" for name in self.enabled for part in DRAWS[name]]

    def parameters(self, draws: Parameters) -> Parameters:
        """What each transform does to each image; 0 is nothing. Angles in radians."""
        chosen = {name: self._gated(name, draws) for name in self.enabled}
        if "aniso" in chosen:
            turned_N = draws["aniso.angle_gate"] < self.aniso_rotate_prob
            chosen["aniso.angle"] = torch.where(turned_N, (draws["aniso.angle"] * 2 - 1) * math.pi, 0.0)
        return chosen

    def apply(
        self, images_NCHW: Float[Tensor, "N C H W"], draws: Parameters
    ) -> tuple[Float[Tensor, "N C H W"], Float[Tensor, "N label_dim"]]:
        """Augment with given draws: (images, labels)."""
        height, width = images_NCHW.shape[2:]
        chosen = self.parameters(draws)
        images_NCHW = self._move_pixels(images_NCHW, chosen)
        if GEOMETRIC & set(chosen):
            images_NCHW = self._warp(images_NCHW, chosen)
        if COLOURS & set(chosen):
            images_NCHW = self._recolour(images_NCHW, chosen)
        return images_NCHW, self._labels(chosen, images_NCHW.new_zeros(images_NCHW.shape[0], 0), height, width)

    def _gated(self, name: str, draws: Parameters) -> Tensor:
        value = draws[f"{name}.value"]
        if name == "translate_int":
            value = value * 2 - 1
        elif name in ("rotate_frac", "hue"):
            value = (value * 2 - 1) * (math.pi * getattr(self, f"{name}_max"))
        acts = draws[f"{name}.gate"] < getattr(self, name) * self.p
        return torch.where(acts if value.ndim == 1 else acts[:, None], value, torch.zeros_like(value))

    def _move_pixels(self, images: Tensor, chosen: Parameters) -> Tensor:
        if "xflip" in chosen:
            images = _where(chosen["xflip"] == 1, images.flip(3), images)
        if "yflip" in chosen:
            images = _where(chosen["yflip"] == 1, images.flip(2), images)
        if "rotate_int" in chosen:
            flip_x, flip_y = _quarter_turns(chosen["rotate_int"])
            images = _where(flip_x, images.flip(3), images)
            images = _where(flip_y, images.flip(2), images)
            images = _where(flip_x ^ flip_y, images.transpose(2, 3), images)
        if "translate_int" in chosen:
            images = translate_reflected(images, self._whole_pixels(chosen["translate_int"], *images.shape[2:]))
        return images

    def _whole_pixels(self, shift_N2: Tensor, height: int, width: int) -> Int64[Tensor, "N 2"]:
        x_N, y_N = shift_N2.unbind(1)
        return torch.stack(
            [(w * (size * self.translate_int_max)).round() for w, size in ((x_N, width), (y_N, height))], 1
        ).long()

    def _warp(self, images: Tensor, chosen: Parameters) -> Tensor:
        height, width = images.shape[2:]
        zero_N = images.new_zeros(images.shape[0])
        shift_N2 = chosen.get("translate_frac", zero_N[:, None].expand(-1, 2)) * self.translate_frac_std
        affine = inverse_affine(
            chosen.get("scale", zero_N) * self.scale_std,
            chosen.get("rotate_frac", zero_N),
            chosen.get("aniso", zero_N) * self.aniso_std,
            chosen.get("aniso.angle", zero_N),
            torch.stack((shift_N2[:, 0] * width, shift_N2[:, 1] * height), dim=1),
        )
        return warp(images, affine)

    def _recolour(self, images: Tensor, chosen: Parameters) -> Tensor:
        zero_N = images.new_zeros(images.shape[0])
        contrast_N = (chosen.get("contrast", zero_N) * self.contrast_std).exp2()
        luma_N = contrast_N * (1 - 2 * chosen.get("lumaflip", zero_N))
        chroma_N = contrast_N * (chosen.get("saturation", zero_N) * self.saturation_std).exp2()
        offset_N = luma_N * chosen.get("brightness", zero_N) * self.brightness_std
        return recolour(images, luma_N, offset_N, chroma_N, chosen.get("hue", zero_N))

    def _labels(self, chosen: Parameters, none_N0: Tensor, height: int, width: int) -> Tensor:
        columns = [none_N0]
        for name in self.enabled:
            value = chosen[name]
            if name == "rotate_int":
                columns += _quarter_turns(value)
            elif name == "translate_int":
                x_N, y_N = self._whole_pixels(value, height, width).unbind(1)
                columns += [x_N / (width * self.translate_int_max), y_N / (height * self.translate_int_max)]
            elif name in ("rotate_frac", "hue"):
                columns += [value.cos() - 1, value.sin()]
            elif name == "aniso":
                columns += [value * chosen["aniso.angle"].cos(), value * chosen["aniso.angle"].sin()]
            else:
                columns.append(value)
        return torch.cat([column.float().reshape(none_N0.shape[0], -1) for column in columns], dim=1)


def translate_reflected(images_NCHW: Float[Tensor, "N C H W"], shift_N2: Int64[Tensor, "N 2"]) -> Float[Tensor, "N C H W"]:
    """Move each image by whole pixels, x to the right and y upwards; what comes in is its reflection."""
    height, width = images_NCHW.shape[2:]
    x_NW = _reflect(torch.arange(width, device=images_NCHW.device) - shift_N2[:, :1], width)
    y_NH = _reflect(torch.arange(height, device=images_NCHW.device) + shift_N2[:, 1:], height)
    rows = images_NCHW.take_along_dim(y_NH[:, None, :, None], dim=2)
    return rows.take_along_dim(x_NW[:, None, None, :], dim=3)


def recolour(
    images_NCHW: Float[Tensor, "N C H W"],
    luma_N: Float[Tensor, " N"],
    offset_N: Float[Tensor, " N"],
    chroma_N: Float[Tensor, " N"],
    hue_N: Float[Tensor, " N"],
) -> Float[Tensor, "N C H W"]:
    """Split colours into mean (luma) and rest (chroma) and change each: y = luma m + offset + chroma R(hue) (x - m).

    m = mean of R, G, B; R(hue) turns about v = (1, 1, 1)/sqrt(3): cos(hue) z + sin(hue) v x z. A grey image is all luma.
    arXiv 2206.00364, appendix F.2 (the product of its 4x4 matrices, written out). hue in radians.
    """
    luma, offset, chroma, hue = (value[:, None, None, None] for value in (luma_N, offset_N, chroma_N, hue_N))
    if images_NCHW.shape[1] == 1:
        return images_NCHW * luma + offset
    mean = images_NCHW.mean(dim=1, keepdim=True)
    rest = images_NCHW - mean
    turned = hue.cos() * rest + (hue.sin() / math.sqrt(3)) * (rest.roll(1, dims=1) - rest.roll(-1, dims=1))
    return mean * luma + offset + chroma * turned


def _reflect(position: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - position % (2 * size - 2)).abs()


def _quarter_turns(turns_N: Tensor) -> tuple[Tensor, Tensor]:
    return (turns_N == 1) | (turns_N == 2), (turns_N == 2) | (turns_N == 3)


def _where(condition_N: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition_N[:, None, None, None], yes, no)


def _slots(table: str) -> int:
    return sum(draw.size for parts in DRAWS.values() for draw in parts.values() if _table(draw) == table)


def _table(draw: Draw) -> str:
    return "normal" if draw.kind == "normal" else "uniform"


def _places() -> dict[str, int]:
    places, used = {}, {"normal": 0, "uniform": 0}
    for name, parts in DRAWS.items():
        for part, draw in parts.items():
            places[f"{name}.{part}"] = used[_table(draw)]
            used[_table(draw)] += draw.size
    return places


def _take(tables: dict[str, Tensor], draw: Draw, place: int) -> Tensor:
    values = tables[_table(draw)][:, place : place + draw.size]
    values = (values * draw.high).floor() if draw.kind == "integer" else values
    return values[:, 0] if draw.size == 1 else values
