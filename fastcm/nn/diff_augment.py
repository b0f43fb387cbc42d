"""Differentiable augmentation of what feature networks see; arXiv 2006.10738."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastcm.random import Stream

NUM_DRAWS = 7


class Draws(NamedTuple):
    """Uniform numbers in [0, 1) of each image: three for its colours, two for its shift, two for the place of the cutout."""

    brightness_N: Float[Tensor, " N"]
    saturation_N: Float[Tensor, " N"]
    contrast_N: Float[Tensor, " N"]
    shift_N2: Float[Tensor, "N 2"]
    cutout_N2: Float[Tensor, "N 2"]


@dataclass(frozen=True, kw_only=True)
class DiffAugment:
    """Brightness, saturation, contrast, translation and cutout, in this order, each with its own random strength per image.

    x + b, b ~ U(-brightness, brightness); m + a (x - m) about the mean m over the channels, a ~ U(0, 2), and about the mean of
    the whole image, a ~ U(1/2, 3/2); a shift by up to ``translation`` of each side, filled with 0; a square of ``cutout`` of
    each side set to 0. The pixels' zero is middle gray. arXiv 2006.10738, section 3.2, policy "color, translation, cutout".
    """

    brightness: float = 0.5
    saturation: float = 1.0
    contrast: float = 0.5
    translation: float = 0.125
    cutout: float = 0.2

    def draw(self, index_N: Int64[Tensor, " N"], seed: int, draw: int = 0, purpose: str = "diff_augment") -> Draws:
        """The random numbers of each global sample index, from Stream(seed, purpose); ``draw`` tells sets apart.

        Real and generated images of one sample are augmented alike with one set, independently with two.
        """
        u = Stream(seed, purpose).uniform(index_N, (NUM_DRAWS,), draw)
        return Draws(u[:, 0], u[:, 1], u[:, 2], u[:, 3:5], u[:, 5:7])

    def __call__(self, images_NCHW: Float[Tensor, "N C H W"], draws: Draws) -> Float[Tensor, "N C H W"]:
        """Augmented images, differentiable in the images, in their dtype."""
        images_NCHW = images_NCHW + _spread(draws.brightness_N, self.brightness).to(images_NCHW.dtype)
        mean = images_NCHW.mean(1, keepdim=True)
        images_NCHW = mean + (images_NCHW - mean) * (1 + _spread(draws.saturation_N, self.saturation)).to(images_NCHW.dtype)
        mean = images_NCHW.mean((1, 2, 3), keepdim=True)
        images_NCHW = mean + (images_NCHW - mean) * (1 + _spread(draws.contrast_N, self.contrast)).to(images_NCHW.dtype)
        return self._cut_out(self._translate(images_NCHW, draws.shift_N2), draws.cutout_N2)

    def _translate(self, images_NCHW: Tensor, shift_N2: Tensor) -> Tensor:
        for axis, dim in enumerate((2, 3)):
            size = images_NCHW.shape[dim]
            limit = int(size * self.translation + 0.5)
            shift_N1 = (shift_N2[:, axis : axis + 1] * (2 * limit + 1)).floor().long() - limit
            source_NS = torch.arange(size, device=images_NCHW.device) - shift_N1
            shape = [len(images_NCHW), 1, 1, 1]
            shape[dim] = size
            # A rotation and a mask: no two pixels have one source, so the gradient is a gather too.
            rotated = images_NCHW.take_along_dim((source_NS % size).reshape(shape), dim)
            inside = (source_NS >= 0) & (source_NS < size)
            images_NCHW = rotated * inside.reshape(shape).to(images_NCHW.dtype)
        return images_NCHW

    def _cut_out(self, images_NCHW: Tensor, place_N2: Tensor) -> Tensor:
        (rows_NH, columns_NW) = (self._inside(place_N2[:, axis], images_NCHW.shape[2 + axis]) for axis in (0, 1))
        keep_NHW = ~(rows_NH[:, :, None] & columns_NW[:, None, :])
        return images_NCHW * keep_NHW[:, None].to(images_NCHW.dtype)

    def _inside(self, place_N: Tensor, size: int) -> Tensor:
        """Which rows or columns the square covers; its centre is any pixel, so that the border cuts some squares."""
        side = int(size * self.cutout + 0.5)
        first_N = (place_N * (size + 1 - side % 2)).floor() - side // 2
        position_S = torch.arange(size, device=place_N.device)
        return (position_S >= first_N[:, None]) & (position_S < first_N[:, None] + side)


def _spread(u_N: Tensor, width: float) -> Tensor:
    """U(-width, width) as a factor of images."""
    return ((u_N * 2 - 1) * width)[:, None, None, None]
