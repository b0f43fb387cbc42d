"""What models, objectives and the trainer ask of any raw network."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.kernels.philox import PhiloxKey
from fastcm.nn.layers import init_weights

Cut = Literal["head", "block"]


class Network(nn.Module):
    """A raw network F(x, c_noise, second, labels, augment); arXiv 2206.00364, Eq. 7.

    It takes square images of img_channels and img_resolution. label_dim and augment_dim are the widths of its conditions, 0
    for none; second_time says whether it takes a second noise level.
    """

    img_channels: int
    img_resolution: int
    label_dim: int = 0
    augment_dim: int = 0
    second_time: bool = False

    def init_weights(self, seed: int) -> "Network":
        """Draw all weights from Stream(seed, "init/<parameter name>") and return the network itself.

        Each parameter's values depend on the seed, its name and its shape only, not on the device or on other layers.
        """
        init_weights(self, seed)
        return self

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C2 H W"]:
        """F(x; c_noise), channels_last, in the dtype of x; labels are one-hot rows, dropout is the key of the masks."""
        raise NotImplementedError

    def trunk(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        cut: Cut = "head",
    ) -> Float[Tensor, "N E H W"]:
        """The network up to a cut: tail(cut)(trunk(..., cut)) is F.

        For losses that weigh each other by their gradients near the end: the cut lies before the last layer ("head"), or
        before the last convolution of the last "block".
        """
        raise ValueError(f"{type(self).__name__} cannot be cut in two")

    def tail(self, cut: Cut = "head") -> nn.Module:
        """The network from a cut on, with its own parameters, the weight of the layer right after the cut first."""
        raise ValueError(f"{type(self).__name__} cannot be cut in two")

    @torch.no_grad()
    def constrain_weights(self, finite: Float[Tensor, ""]) -> None:
        """Bring the weights back to where the architecture keeps them, after each optimizer step; by default nothing.

        Where ``finite`` is 0 the step was skipped, and no bit may change.
        """

    def log_variance(self, c_noise_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """u(sigma), the learned log variance of the loss (arXiv 2312.02696, Eq. 21), of networks that have one."""
        raise ValueError(f"{type(self).__name__} has no log variance: use family edm2 with logvar_channels above 0")

    def check_inputs(
        self,
        x_NCHW: Tensor,
        second_N: Float[Tensor, " N"] | None = None,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> None:
        """Raise ValueError for arguments that this network was not built for."""
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if x_NCHW.ndim != 4 or tuple(x_NCHW.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(x_NCHW.shape)}, but this network takes [N, {', '.join(map(str, expected))}]"
            )
        _check_condition("labels", labels, self.label_dim, len(x_NCHW))
        _check_condition("augment", augment, self.augment_dim, len(x_NCHW))
        if (second_N is not None) != self.second_time:
            given, needed = ("is missing", "needs") if self.second_time else ("was given", "has no")
            raise ValueError(f"second_N {given}, but this network {needed} a second time (second_time={self.second_time})")


def _check_condition(name: str, value: Tensor | None, dim: int, num: int) -> None:
    if value is None:
        return
    if not dim:
        raise ValueError(f"{name} were given, but this network was built without them ({name.removesuffix('s')}_dim=0)")
    if tuple(value.shape) != (num, dim):
        raise ValueError(f"{name} have shape {tuple(value.shape)}, but this network takes rows of {dim} for {num} images")


def level_resolutions(img_resolution: int, num_levels: int) -> list[int]:
    """Resolution of each level of a U-Net, each half of the one above; raises ValueError where one cannot be halved."""
    if num_levels < 1 or img_resolution % 2 ** (num_levels - 1):
        raise ValueError(f"resolution {img_resolution} cannot be halved for {num_levels} levels (channel_mult)")
    return [img_resolution >> level for level in range(num_levels)]


def level_name(resolution: int, kind: str) -> str:
    """The official name of a part of a level, such as 16x16_block0."""
    return f"{resolution}x{resolution}_{kind}"
