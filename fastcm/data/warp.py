"""Affine image resampling that neither leaks the frame nor aliases: reflect, upsample, sample, downsample.

arXiv 2206.00364, appendix F.2, after arXiv 2006.06676, appendix B. Reflection and both filters are linear along each
axis, so each side of the image needs one constant matrix in and one out. How far the image is reflected does not depend
on the transformation; hence no value is read back from the device and no image influences another.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

# Low-pass filter of the orthogonal wavelet sym6 (Daubechies, "Ten lectures on wavelets", 1992): sum sqrt(2), and
# orthonormal to its own shifts by 2, so that up- and downsampling alone give the image back exactly.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# Pixels beyond each edge that the downsampling filter reaches.
REACH = len(SYM6) // 4


class Affine(NamedTuple):
    """One inverse affine map per image: output pixel (x, y) shows input (xx x + xy y + x0, yx x + yy y + y0).

    Each field has shape [N]; coordinates are pixels from the image centre, y downwards.
    """

    xx: Tensor
    xy: Tensor
    yx: Tensor
    yy: Tensor
    x0: Tensor
    y0: Tensor


def inverse_affine(
    log2_scale_N: Float[Tensor, " N"],
    rotation_N: Float[Tensor, " N"],
    log2_stretch_N: Float[Tensor, " N"],
    stretch_angle_N: Float[Tensor, " N"],
    shift_N2: Float[Tensor, "N 2"],
) -> Affine:
    """The inverse of: shift by t, stretch by a along one axis and 1/a across, rotate, scale by s.

    A = (1/s) R(w) (cosh(l) I - sinh(l) K(r)), b = -A t, l = ln a, K(r) = [[cos 2r, -sin 2r], [-sin 2r, -cos 2r]],
    where the bracket is R(-r) diag(1/a, a) R(r) written out. Angles in radians, shift in pixels.
    arXiv 2206.00364, appendix F.2.
    """
    stretch = log2_stretch_N * math.log(2)
    mean, difference = stretch.cosh(), -stretch.sinh()
    along, across = difference * (2 * stretch_angle_N).cos(), -difference * (2 * stretch_angle_N).sin()
    cos, sin = rotation_N.cos() * (-log2_scale_N).exp2(), rotation_N.sin() * (-log2_scale_N).exp2()
    xx, xy = cos * (mean + along) - sin * across, cos * across - sin * (mean - along)
    yx, yy = sin * (mean + along) + cos * across, sin * across + cos * (mean - along)
    shift_x, shift_y = shift_N2.unbind(1)
    return Affine(xx, xy, yx, yy, -(xx * shift_x + xy * shift_y), -(yx * shift_x + yy * shift_y))


def warp(images_NCHW: Float[Tensor, "N C H W"], affine: Affine) -> Float[Tensor, "N C H W"]:
    """Each image seen through its inverse affine map; the world beyond one reflection of the image is zero.

    The image is reflected by its size minus one pixel on each side, upsampled by 2 with sym6, sampled bilinearly, and
    downsampled with the same filter. arXiv 2206.00364, appendix F.2. Needs sides of at least 2.
    """
    height, width = images_NCHW.shape[2:]
    device = images_NCHW.device
    (enlarge_h, reduce_h), (enlarge_w, reduce_w) = _filters(height, device), _filters(width, device)
    large = enlarge_h @ (images_NCHW.contiguous() @ enlarge_w.T)
    seen = grid_sample(large, _grid(affine, height, width, large.shape), "bilinear", "zeros", align_corners=False)
    return reduce_h @ (seen @ reduce_w.T)


def _grid(affine: Affine, height: int, width: int, large_shape: torch.Size) -> Float[Tensor, "N Y X 2"]:
    """Where to sample the enlarged image, in grid_sample's units of half its sides.

    Sample k of the enlarged image lies at pixel k / 2: half a sample left of where two samples per pixel, centred on
    the pixel, would have it.
    """
    device = affine.xx.device
    # Written out: a matrix product may run in TF32, which is too coarse for coordinates.
    x_X, y_Y1 = _sample_positions(width, device), _sample_positions(height, device)[:, None]
    xx, xy, yx, yy, x0, y0 = (value[:, None, None] for value in affine)
    x_NYX = 2 * (xx * x_X + xy * y_Y1 + x0) - 0.5
    y_NYX = 2 * (yx * x_X + yy * y_Y1 + y0) - 0.5
    return torch.stack((x_NYX * (2 / large_shape[3]), y_NYX * (2 / large_shape[2])), dim=-1)


def _sample_positions(size: int, device: torch.device) -> Tensor:
    count = 2 * (size + 2 * REACH)
    return (torch.arange(count, device=device) + (1 - count / 2)) / 2


@lru_cache(maxsize=16)
def _filters(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(enlarge [2(3 size - 2), size], reduce [size, 2(size + 2 REACH)]) along one axis."""
    # Built outside any inference mode, for it is kept.
    with torch.inference_mode(False):
        taps = torch.tensor(SYM6, dtype=torch.float32)
        padded = torch.arange(3 * size - 2)
        reflected = (size - 1 - (size - 1 - (padded - (size - 1)) % (2 * size - 2)).abs()).long()
        enlarge = _banded(taps, 5 + torch.arange(2 * len(padded))[:, None] - 2 * padded)
        reduce = _banded(taps, torch.arange(2 * (size + 2 * REACH)) - 2 * torch.arange(size)[:, None] - 1)
        folded = torch.zeros(enlarge.shape[0], size).index_add_(1, reflected, enlarge)
        return folded.to(device), reduce.to(device)


def _banded(taps: Tensor, offsets: Tensor) -> Tensor:
    inside = (offsets >= 0) & (offsets < len(taps))
    return torch.where(inside, taps[offsets.clamp(0, len(taps) - 1)], 0.0)
