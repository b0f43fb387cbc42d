"""The projected discriminator: heads on randomly projected features of frozen networks.

Sauer et al., "Projected GANs Converge Faster", arXiv 2111.01007; with several feature networks, arXiv 2202.00273; as the
adversarial stage of consistency trajectory models, arXiv 2310.02279.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastcm.errors import ConfigError
from fastcm.nn.diff_augment import DiffAugment, Draws
from fastcm.nn.features import Maps, MapShape
from fastcm.nn.init import Init, init_layer, unset
from fastcm.nn.layers import GroupNorm
from fastcm.nn.projection import ProjectedFeatures, init_layers
from fastcm.random import Stream

Norm = Literal["batch", "group"]

# PyTorch's own distribution, U(-1, 1) / sqrt(fan_in), which the published heads begin from.
FRESH = Init("kaiming_uniform", weight=1 / math.sqrt(3), bias=1 / math.sqrt(3))
END_SIDE = 8  # maps are halved while they are above this side
LAST_KERNEL = 4
CLASS_CHANNELS = 64
SLOPE = 0.2
NORM_EPS = 1e-5
SETTLING_ITERATIONS = 15
SIGMA_EPS = 1e-12


class SpectralConv(nn.Module):
    """Convolution by W / sigma(W), sigma = u^T W v the largest singular value of W as [out, in k^2]; arXiv 1802.05957, Eq. 8.

    u and v are buffers that ``power_iteration`` moves, once after each optimizer step. Forward only reads them, so every
    forward of a step (real, generated, microbatches, the generator's) has the same weights, and no buffer changes inside
    a compiled or replayed graph. sigma takes part in the gradient, u and v do not.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.stride, self.padding = stride, 1 if stride > 1 else 0
        self.weight = unset(out_channels, in_channels, kernel, kernel)
        self.bias = unset(out_channels) if bias else None
        self.register_buffer("u", torch.full((out_channels,), math.nan))
        self.register_buffer("v", torch.full((in_channels * kernel**2,), math.nan))

    def init_weights(self, seed: int, name: str) -> None:
        """Weights from init/<name>.weight and .bias, u from init/<name>.u, then some power iterations."""
        init_layer(FRESH, self.weight, self.bias, seed, name)
        only = torch.zeros(1, dtype=torch.int64, device=self.u.device)
        self.u.copy_(F.normalize(Stream(seed, f"init/{name}.u").normal(only, (len(self.u),))[0], dim=0))
        for _ in range(SETTLING_ITERATIONS):
            self.power_iteration(torch.ones((), device=self.u.device))

    @torch.no_grad()
    def power_iteration(self, finite: Float[Tensor, ""]) -> None:
        """v <- W^T u / ||W^T u||, u <- W v / ||W v||; where ``finite`` is 0 no bit changes. arXiv 1802.05957, Eq. 20 and 21."""
        weight = self.weight.flatten(1)
        v = F.normalize(weight.T @ self.u, dim=0, eps=SIGMA_EPS)
        u = F.normalize(weight @ v, dim=0, eps=SIGMA_EPS)
        self.v.copy_(torch.where(finite > 0, v, self.v))
        self.u.copy_(torch.where(finite > 0, u, self.u))

    def sigma(self) -> Float[Tensor, ""]:
        """u^T W v."""
        return self.u @ (self.weight.flatten(1) @ self.v)

    def forward(self, x_NCHW: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H2, W2] in the dtype of x: halved, or without the border."""
        weight = (self.weight / self.sigma()).to(x_NCHW.dtype)
        bias = None if self.bias is None else self.bias.to(x_NCHW.dtype)
        return F.conv2d(x_NCHW, weight, bias, stride=self.stride, padding=self.padding)


class BatchNorm(nn.Module):
    """Norm by the statistics of the batch at hand, always, with scale and shift per channel; arXiv 1502.03167, Algorithm 1.

    No running statistics: a discriminator is never evaluated outside training.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight, self.bias = unset(num_channels), unset(num_channels)

    def init_weights(self, seed: int, name: str) -> None:
        """Weight 1, bias 0."""
        self.weight.fill_(1)
        self.bias.fill_(0)

    def forward(self, x_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Statistics in fp32 or better; the dtype of x."""
        return F.batch_norm(x_NCHW, None, None, self.weight, self.bias, training=True, eps=NORM_EPS)


class Head(nn.Module):
    """The discriminator of one feature map: [N, C, S, S] to logits [N, K].

    While the side is above 8: 4x4 convolution with stride 2, norm, leaky ReLU; then a 4x4 convolution without border to one
    channel. Widths double from block to block up to ``width`` = 512 at the last. With ``label_dim``, the last convolution
    has a second output h of m = 64 channels and each logit gains <V y, h> / sqrt(m) of the one-hot label y (projection,
    arXiv 1802.05637, Eq. 3). All convolutions are spectrally normalised. arXiv 2111.01007, section 3.3 and Appendix.
    Raises ConfigError for a map too small for a logit.
    """

    def __init__(self, shape: MapShape, *, label_dim: int = 0, width: int = 512, norm: Norm = "batch") -> None:
        super().__init__()
        sides = [shape.side]
        while sides[-1] > END_SIDE:
            sides.append(sides[-1] // 2)
        if sides[-1] < LAST_KERNEL:
            raise ConfigError(
                f"a feature map of side {shape.side} is too small for a discriminator: choose a larger image size for "
                f"the feature network, so that its coarsest map has at least {LAST_KERNEL // 2} pixels a side"
            )
        steps = len(sides) - 1
        widths = [shape.channels, *(max(width >> (steps - 1 - step), min(width, 64)) for step in range(steps))]
        self.blocks = nn.Sequential(*(_down_block(*pair, norm) for pair in pairwise(widths)))
        self.last = SpectralConv(widths[-1], 1, LAST_KERNEL)
        self.class_map = SpectralConv(widths[-1], CLASS_CHANNELS, LAST_KERNEL) if label_dim else None
        self.class_embedding = SpectralConv(label_dim, CLASS_CHANNELS, 1) if label_dim else None
        self.num_logits = (sides[-1] - LAST_KERNEL + 1) ** 2

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], labels: Float[Tensor, "N L"] | None = None) -> Float[Tensor, "N K"]:
        """One logit per position, in fp32 or better; labels are one-hot rows, needed if ``label_dim`` was given."""
        hidden = self.blocks(x_NCHW)
        logits = self.last(hidden)
        if self.class_map is not None:
            embedded = self.class_embedding(labels.to(hidden.dtype)[:, :, None, None])
            logits = logits + (self.class_map(hidden) * embedded).sum(1, keepdim=True) / math.sqrt(CLASS_CHANNELS)
        return logits.flatten(1).to(torch.promote_types(logits.dtype, torch.float32))


class ProjectedDiscriminator(nn.Module):
    """Four heads on the projected maps of each feature network; their logits side by side are the verdict on an image.

    ``features`` are frozen, a function of files and the seed; ``heads`` hold all parameters and all state to save (the
    weights and the vectors of the spectral norm). Arguments: features by name; label_dim > 0 for class-conditional heads;
    width of the heads; norm: "batch" as published, or "group", with which the logits of an image do not depend on the other
    images of its batch; augment, None for no augmentation. Weights are all NaN before ``init_weights``.
    """

    def __init__(
        self,
        features: Mapping[str, ProjectedFeatures],
        *,
        label_dim: int = 0,
        width: int = 512,
        norm: Norm = "batch",
        augment: DiffAugment | None = None,
    ) -> None:
        super().__init__()
        self.label_dim, self.augment = label_dim, augment
        self.names = tuple(features)
        self.features = nn.ModuleList(features.values())
        self.heads = nn.ModuleList(
            nn.ModuleList(Head(shape, label_dim=label_dim, width=width, norm=norm) for shape in network.shapes)
            for network in features.values()
        )

    @property
    def num_logits(self) -> int:
        """K, the logits of an image."""
        return sum(head.num_logits for heads in self.heads for head in heads)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Self:
        """Draw projections and heads from the streams "init/projection..." and "init/discriminator..."."""
        for name, features, heads in zip(self.names, self.features, self.heads, strict=True):
            features.init_projection(seed)
            init_layers(heads, seed, f"discriminator.{name}")
        return self

    def draw(self, index_N: Int64[Tensor, " N"], seed: int, *, fake: bool = False) -> tuple[Draws, ...]:
        """Random numbers of the augmentation, a set for each feature network, keyed by the global sample index.

        With fake=True another set: augment generated images alike or differently by giving theirs the one or the other.
        Raises ValueError where there is no augmentation.
        """
        if self.augment is None:
            raise ValueError("this discriminator was built without augmentation")
        return tuple(self.augment.draw(index_N, seed, 2 * number + fake) for number in range(len(self.names)))

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        labels: Float[Tensor, "N L"] | None = None,
        draws: Sequence[Draws] | None = None,
    ) -> Float[Tensor, "N K"]:
        """Logits of images in [-1, 1], positive for real ones; augmented by ``draws`` if they are given.

        Labels are one-hot rows. Raises ValueError for labels that do not fit ``label_dim``, or ``draws`` the networks.
        """
        self._check(x_NCHW, labels, draws)
        logits = []
        for number, (features, heads) in enumerate(zip(self.features, self.heads, strict=True)):
            images = x_NCHW if draws is None else self.augment(x_NCHW, draws[number])
            maps: Maps = features(images)
            logits += [head(x_map, labels) for head, x_map in zip(heads, maps, strict=True)]
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def constrain_weights(self, finite: Float[Tensor, ""]) -> None:
        """One power iteration of each spectral norm, after each step of the discriminator's optimizer.

        Where ``finite`` is 0 the step was skipped, and no bit changes.
        """
        for module in self.heads.modules():
            if isinstance(module, SpectralConv):
                module.power_iteration(finite)

    def _check(self, x_NCHW: Tensor, labels: Tensor | None, draws: Sequence[Draws] | None) -> None:
        expected = (len(x_NCHW), self.label_dim) if self.label_dim else None
        found = None if labels is None else tuple(labels.shape)
        if found != expected:
            raise ValueError(f"labels have shape {found}, this discriminator takes {expected} (label_dim={self.label_dim})")
        if draws is not None and (self.augment is None or len(draws) != len(self.names)):
            networks = 0 if self.augment is None else len(self.names)
            raise ValueError(f"{len(draws)} sets of draws were given, this discriminator augments for {networks} networks")


def _down_block(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    normalize = BatchNorm(out_channels) if norm == "batch" else GroupNorm(out_channels, NORM_EPS)
    convolution = SpectralConv(in_channels, out_channels, 4, stride=2, bias=True)
    return nn.Sequential(convolution, normalize, nn.LeakyReLU(SLOPE))
