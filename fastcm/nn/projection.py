"""Random, frozen mixing of feature maps across channels and scales; arXiv 2111.01007, section 3.1 and 3.2."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.nn.features import FeatureNetwork, Frozen, Maps, MapShape
from fastcm.nn.init import Init, init_layer

# Variance is kept: no nonlinearity follows.
KEEP = Init("kaiming_normal")


class FrozenConv(nn.Module):
    """A convolution by random weights, or its transpose with stride = kernel; a buffer, so nothing trains it. No bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, up: bool = False) -> None:
        super().__init__()
        self.stride, self.up, self.padding = stride, up, kernel // 2
        # A transposed convolution with stride = kernel is a 1x1 convolution to kernel^2 times the channels.
        shape = (out_channels * kernel**2, in_channels, 1, 1) if up else (out_channels, in_channels, kernel, kernel)
        self.factor = kernel if up else 1
        self.register_buffer("weight", torch.full(shape, math.nan).to(memory_format=torch.channels_last))

    def init_weights(self, seed: int, name: str) -> None:
        """Fill the buffer from the stream init/<name>.weight."""
        init_layer(KEEP, self.weight, None, seed, name)

    def forward(self, x_NCHW: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H / stride, W / stride], or to kernel times the sides."""
        weight = self.weight.to(x_NCHW.dtype)
        if not self.up:
            return F.conv2d(x_NCHW, weight, stride=self.stride, padding=self.padding)
        return F.pixel_shuffle(F.conv2d(x_NCHW, weight), self.factor)


class RandomProjection(Frozen):
    """Feature maps to maps of the same sides doubled: channels mixed by 1x1, scales by 3x3 convolutions and upsampling.

    Cross-channel mixing takes map l (finest first) to c_l = cout 2^l channels. Cross-scale mixing goes from the coarsest map
    to the finest: z_l = up2(conv_l(z_(l+1) + mix_l)), half the channels each time but for the finest, up2 bilinear with
    corners aligned. Maps of one resolution, as a vision transformer's, are first brought to four, by 1x1 convolutions to
    C/8, C/4, C/2, C channels and transposed or strided convolutions to factors 4, 2, 1, 1/2 (arXiv 2103.13413, section 3).
    All weights are random and fixed. arXiv 2111.01007, section 3.2; arXiv 2202.00273, section 3.2.

    Arguments: shapes, of the incoming maps; cout = 64 as published; scale_kernel: 3 as in the paper, 1 as in the networks
    that StyleGAN-XL and CTM were trained with, a sixth of the operations (EfficientNet-Lite0). ``shapes`` are what comes out.
    """

    def __init__(self, shapes: Sequence[MapShape], *, cout: int = 64, scale_kernel: Literal[1, 3] = 3) -> None:
        super().__init__()
        self.reassemble, shapes = _reassemble(shapes)
        mixed = [cout * 2**level for level in range(len(shapes))]
        self.channels = nn.ModuleList(FrozenConv(shape.channels, width) for shape, width in zip(shapes, mixed, strict=True))
        widths = [mixed[0], *mixed[:-1]]
        self.scales = nn.ModuleList(FrozenConv(*pair, scale_kernel) for pair in zip(mixed, widths, strict=True))
        # Up to the side of the next finer map, which is the double but for odd ones.
        sides = [2 * shapes[0].side, *(shape.side for shape in shapes[:-1])]
        rows = zip(widths, sides, shapes, strict=True)
        self.shapes = tuple(MapShape(width, side, max(1, shape.reduction // 2)) for width, side, shape in rows)

    def forward(self, maps: Maps) -> Maps:
        """Maps of the shapes given to the constructor to those of ``shapes``, finest first, in the dtype of the maps."""
        maps = [resize(x_NCHW) for resize, x_NCHW in zip(self.reassemble, maps, strict=True)]
        mixed = [channel(x_NCHW) for channel, x_NCHW in zip(self.channels, maps, strict=True)]
        outputs: list[Tensor] = []
        for level in reversed(range(len(mixed))):
            z_NCHW = mixed[level] + outputs[-1] if outputs else mixed[level]
            # A convolution before the upsampling costs a quarter; for 1x1 the result is the same.
            outputs.append(_upsample(self.scales[level](z_NCHW), self.shapes[level].side))
        return outputs[::-1]


class ProjectedFeatures(Frozen):
    """A feature network and its random projection: images in [-1, 1] to mixed maps; a function of a file and a seed."""

    def __init__(self, network: FeatureNetwork, *, cout: int = 64, scale_kernel: Literal[1, 3] = 3) -> None:
        super().__init__()
        self.network = network
        self.projection = RandomProjection(network.shapes, cout=cout, scale_kernel=scale_kernel)

    @property
    def shapes(self) -> tuple[MapShape, ...]:
        """Shapes of the mixed maps, finest first."""
        return self.projection.shapes

    @torch.no_grad()
    def init_projection(self, seed: int, prefix: str = "projection") -> "ProjectedFeatures":
        """Draw the projection from the streams "init/<prefix>.<network>...": the same on every rank and after a resume."""
        init_layers(self.projection, seed, f"{prefix}.{self.network.name}")
        return self

    def forward(self, x_NCHW: Float[Tensor, "N C H W"]) -> Maps:
        """The mixed maps of ``shapes``."""
        return self.projection(self.network(x_NCHW))


def init_layers(module: nn.Module, seed: int, prefix: str) -> None:
    """Call ``init_weights`` of every layer below ``module`` with its name behind a prefix that no other network has."""
    for name, child in module.named_modules():
        if child is not module and hasattr(child, "init_weights"):
            child.init_weights(seed, f"{prefix}.{name}")


def _reassemble(shapes: Sequence[MapShape]) -> tuple[nn.ModuleList, Sequence[MapShape]]:
    if len({shape.reduction for shape in shapes}) > 1:
        return nn.ModuleList(nn.Identity() for _ in shapes), shapes
    steps, found = nn.ModuleList(), []
    for level, shape in enumerate(shapes):
        width = shape.channels >> (len(shapes) - 1 - level)
        factor = 2 ** (2 - level) if level < 3 else 0
        layers, side = [FrozenConv(shape.channels, width)], shape.side * factor
        if factor > 1:
            layers.append(FrozenConv(width, width, factor, up=True))
        elif not factor:
            layers.append(FrozenConv(width, width, 3, stride=2))
            side = -(-shape.side // 2)
        steps.append(nn.Sequential(*layers))
        found.append(MapShape(width, side, shape.reduction * 2**level // 4))
    return steps, found


def _upsample(x_NCHW: Tensor, side: int) -> Tensor:
    return F.interpolate(x_NCHW, size=(side, side), mode="bilinear", align_corners=True)
