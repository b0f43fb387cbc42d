"""Distances of two images by frozen networks: LPIPS (arXiv 1801.03924), and that of projected features (arXiv 2310.02279)."""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastcm.nn.diff_augment import DiffAugment
from fastcm.nn.features import Frozen, Maps, map_distance, optional_package, random_weights, resize, three_colours
from fastcm.nn.projection import ProjectedFeatures
from fastcm.random import Stream

# The last layers before each of VGG16's five poolings (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3) and their channels.
TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
# ImageNet's mean and standard deviation in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALL = 256  # images below this side are resized


class LPIPS(Frozen):
    """d(x, y) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (f^_l(x) - f^_l(y))^2 of images in [-1, 1]; arXiv 1801.03924, Eq. 1.

    f^_l are the features of five layers of torchvision's VGG16, normalised over the channels; w_l >= 0 were fitted to human
    judgement. Consistency models train with images below 256 pixels resized to 224 and with average instead of maximum
    pooling (arXiv 2303.01469), which are the defaults; ``resize=0, replace_pooling=False`` is the distance of the paper.

    Arguments: resize, the side that small images are resized to (0 keeps them); dtype of VGG's weights and arithmetic, the
    distances being fp32 always. Weights are all NaN before ``weights()`` are filled or ``init_weights``.
    Raises ConfigError if torchvision is missing.
    """

    def __init__(self, *, resize: int = 224, replace_pooling: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.resize = resize
        self.torso = _vgg16_features(replace_pooling).to(dtype)
        self.linear = nn.ParameterList(nn.Parameter(torch.full((width,), math.nan)) for width in TAPS.values())
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.freeze()

    def weights(self) -> dict[str, Float[Tensor, "..."]]:
        """VGG16's parameters by torchvision's names, "features.0.weight" and so on."""
        return {f"features.{name}": value for name, value in self.torso.state_dict().items()}

    def linear_weights(self) -> dict[str, Float[Tensor, "1 C 1 1"]]:
        """The weights w_l by the names of the LPIPS release, "lin0.model.1.weight" and so on."""
        return {f"lin{level}.model.1.weight": weight.data[None, :, None, None] for level, weight in enumerate(self.linear)}

    @torch.no_grad()
    def init_weights(self, seed: int) -> Self:
        """Random weights, the linear ones uniform in [0, 1), for runs and tests without trained ones."""
        random_weights(self.weights(), seed, "lpips")
        for name, weight in self.linear_weights().items():
            only = torch.zeros(1, dtype=torch.int64, device=weight.device)
            weight.copy_(Stream(seed, f"init/lpips.{name}").uniform(only, tuple(weight.shape))[0])
        return self

    def features(self, x_NCHW: Float[Tensor, "N C H W"]) -> Maps:
        """The five feature maps of images in [-1, 1] with 1 or 3 channels."""
        x_NCHW = three_colours(x_NCHW)
        if self.resize and min(x_NCHW.shape[2:]) < SMALL:
            x_NCHW = resize(x_NCHW, self.resize)
        dtype = next(self.torso.parameters()).dtype
        hidden = ((x_NCHW - self.shift) / self.scale).to(dtype, memory_format=torch.channels_last)
        maps = []
        for index, layer in enumerate(self.torso):
            hidden = layer(hidden)
            if index in TAPS:
                maps.append(hidden)
        return maps

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], y_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
        """The distance of each image x to its target y, in fp32; gradients flow to x if it requires them, never to y."""
        with torch.no_grad():
            targets = self.features(y_NCHW)
        return map_distance(self.features(x_NCHW), targets, list(self.linear))


class FeatureDistance(Frozen):
    """d(x, y) = sum_network sum_l mean_hw sum_c (p^_lc(a(x)) - p^_lc(a(y)))^2 of images in [-1, 1]; "cnn_vit" of CTM's code.

    p_l are the randomly projected maps of each network, p^_l the same normalised over their channels (``map_distance``), a one
    random augmentation of both images, drawn anew for every network. arXiv 2310.02279, section 3; the projection of
    arXiv 2202.00273 and the augmentation of arXiv 2006.10738 are those of the authors' discriminator.

    Arguments: networks, with their projections drawn; seed of the augmentation; augment, None for none.
    """

    def __init__(self, networks: Sequence[ProjectedFeatures], seed: int = 0, augment: DiffAugment | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.seed, self.augment = seed, augment

    def forward(
        self, x_NCHW: Float[Tensor, "N C H W"], y_NCHW: Float[Tensor, "N C H W"], index_N: Int64[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The distance of each image x, a global sample index, to its target y, in fp32; no gradient flows to y.

        The augmentation comes from Stream(seed, "distance_augment").
        """
        distances = []
        for number, network in enumerate(self.networks):
            augment = self._augmentation(index_N, number)
            with torch.no_grad():
                targets = network(augment(y_NCHW))
            distances.append(map_distance(network(augment(x_NCHW)), targets))
        return torch.stack(distances).sum(0)

    def _augmentation(self, index_N: Tensor, number: int) -> Callable[[Tensor], Tensor]:
        """What both images of each pair go through before the network of this number, drawn once for the two."""
        if self.augment is None:
            return lambda images_NCHW: images_NCHW
        draws = self.augment.draw(index_N, self.seed, number, "distance_augment")
        return lambda images_NCHW: self.augment(images_NCHW, draws)


def _vgg16_features(replace_pooling: bool) -> nn.Sequential:
    """VGG16 up to the last tap, all NaN; nothing is drawn on the device "meta"."""
    with torch.device("meta"):
        layers = list(optional_package("torchvision.models").vgg16(weights=None, init_weights=False).features)
    if replace_pooling:
        layers = [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers]
    torso = nn.Sequential(*layers[: max(TAPS) + 1]).to_empty(device="cpu")
    for value in torso.state_dict().values():
        value.fill_(math.nan)
    return torso
