"""Distances of two images that look at more than the sum of squares, which ``ops.consistency_loss`` takes care of."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastcm import ops

PERCEPTUAL = ("lpips", "features")  # by frozen networks
IMAGE_DISTANCES = ("l1", "squared_32", *PERCEPTUAL)
ALL_DISTANCES = (*ops.DISTANCES, *IMAGE_DISTANCES)


def image_distance(
    distance: str,
    x_NCHW: Float[Tensor, "N C H W"],
    y_NCHW: Float[Tensor, "N C H W"],
    perceptual: nn.Module | None = None,
    index_N: Int64[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """The distance of each image to its target.

    "l1" sum |x - y| over pixels; "squared_32" sum of squares after bilinear resizing to 32x32; "lpips" (arXiv 1801.03924) and
    "features" (arXiv 2310.02279) the ``perceptual`` distance of images in [-1, 1], the latter augmented by their global
    sample index. arXiv 2303.01469, section 6.1.
    Raises ValueError for an unknown distance or a missing feature network.
    """
    if distance == "l1":
        return (x_NCHW - y_NCHW).abs().flatten(1).sum(1)
    if distance == "squared_32":
        x_NCHW, y_NCHW = (F.interpolate(image, size=32, mode="bilinear") for image in (x_NCHW, y_NCHW))
        return (x_NCHW - y_NCHW).square().flatten(1).sum(1)
    if distance not in PERCEPTUAL:
        raise ValueError(f"unknown distance {distance!r}; choose one of {', '.join(ALL_DISTANCES)}")
    if perceptual is None:
        raise ValueError(f"the distance {distance} needs a feature network; give one as networks.perceptual")
    return perceptual(x_NCHW, y_NCHW) if distance == "lpips" else perceptual(x_NCHW, y_NCHW, index_N)


def weighted_distance(
    distance: str,
    x_NCHW: Float[Tensor, "N C H W"],
    y_NCHW: Float[Tensor, "N C H W"],
    weight_N: Float[Tensor, " N"],
    c: float = 0.0,
    perceptual: nn.Module | None = None,
    index_N: Int64[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """weight d(x, y) for any of ``ALL_DISTANCES`` of images that are there already; the target y carries no gradient.

    c: of "pseudo_huber"; the other arguments and the errors are those of ``image_distance``.
    """
    y_NCHW = y_NCHW.detach()
    if distance not in ops.DISTANCES:
        return weight_N * image_distance(distance, x_NCHW, y_NCHW, perceptual, index_N)
    # An image is D = c_skip y + c_out x with c_skip = 0 and c_out = 1.
    zero_N, one_N = torch.zeros_like(weight_N), torch.ones_like(weight_N)
    return ops.consistency_loss(x_NCHW, y_NCHW, zero_N, one_N, y_NCHW, weight_N, distance=distance, c=c)
