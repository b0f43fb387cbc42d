"""Resampling by two in plain PyTorch: the numbers that every backend must reproduce.

Reference: Zhang, "Making Convolutional Networks Shift-Invariant Again", arXiv 1904.11486, section 3.2 (filter, then
subsample); the U-Nets of arXiv 2011.13456, Appendix H, use (1, 1) and (1, 3, 3, 1).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BOX = (1.0, 1.0)


def resample(x_NCHW: Float[Tensor, "N C H W"], filter: tuple[float, ...], up: bool) -> Float[Tensor, "N C H2 W2"]:
    """Double (``up``) or halve the resolution with a separable symmetric filter.

    down: y[i] = sum_k f[k] x[2 i + k - p]; up: y[j] = 2 sum over k with j + p - k even of f[k] x[(j + p - k) / 2];
    per axis, with f = filter / sum(filter), p = (len(filter) - 1) // 2 and zeros outside the image.
    (1, 1) is therefore the mean of 2 x 2 pixels, and up a repetition of each. dtype and memory format stay.
    """
    if tuple(filter) == BOX:
        return F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest") if up else F.avg_pool2d(x_NCHW, 2)
    # Filled on the device: a tensor made from a Python list would be copied from the host on every call.
    taps_K = torch.stack([x_NCHW.new_full((), tap * (1 + up) / sum(filter)) for tap in filter])
    return _along(_along(x_NCHW, taps_K, up, axis=0), taps_K, up, axis=1)


def _along(x_NCHW: Tensor, taps_K: Tensor, up: bool, axis: int) -> Tensor:
    """One axis of the filter (0 is height, 1 is width) as a convolution of each channel with itself only."""
    weight_shape, stride, padding = [1, 1, 1, 1], [1, 1], [0, 0]
    weight_shape[2 + axis], stride[axis], padding[axis] = len(taps_K), 2, (len(taps_K) - 1) // 2
    channels = x_NCHW.shape[1]
    weight = taps_K.reshape(weight_shape).expand(channels, -1, -1, -1)
    convolve = F.conv_transpose2d if up else F.conv2d
    return convolve(x_NCHW, weight, stride=stride, padding=padding, groups=channels)
