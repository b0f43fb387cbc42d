"""The layers of the U-Nets: fp32 parameters, arithmetic in the dtype of the input, channels_last memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm import ops
from fastcm.kernels.philox import PhiloxKey
from fastcm.nn.init import Init, init_layer, unset

MAX_GROUPS = 32


class Linear(nn.Module):
    """y = W x + b with the weights cast to the dtype of x."""

    def __init__(self, in_features: int, out_features: int, init: Init, bias: bool = True) -> None:
        super().__init__()
        self.init = init
        self.weight = unset(out_features, in_features)
        self.bias = unset(out_features) if bias else None

    def init_weights(self, seed: int, name: str) -> None:
        """Fill the parameters from the streams init/<name>.weight and init/<name>.bias."""
        init_layer(self.init, self.weight, self.bias, seed, name)

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """[N, in_features] to [N, out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def linear_of_all(
    x: Float[Tensor, "N I"], weights: Sequence[Float[Tensor, "_ I"]], biases: Sequence[Float[Tensor, " _"]]
) -> Float[Tensor, "N O"]:
    """The outputs of several linear layers with one input, side by side, by one matrix product."""
    return F.linear(x, torch.cat(list(weights)).to(x.dtype), torch.cat(list(biases)).to(x.dtype))


class Resample(nn.Module):
    """Doubles (``up``) or halves the resolution; has no parameters."""

    def __init__(self, filter: tuple[float, ...], up: bool) -> None:
        super().__init__()
        self.filter, self.up = filter, up

    def forward(self, x_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H2 W2"]:
        """[N, C, H, W] to [N, C, 2 H, 2 W] or [N, C, H / 2, W / 2]."""
        return ops.resample(x_NCHW, self.filter, self.up)


class Conv(nn.Module):
    """Convolution that keeps the resolution, of the input or of the ``resample``d input."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, init: Init, resample: Resample | None = None) -> None:
        super().__init__()
        self.init, self.padding, self.resample = init, kernel // 2, resample
        self.weight = unset(out_channels, in_channels, kernel, kernel)
        self.bias = unset(out_channels)

    def init_weights(self, seed: int, name: str) -> None:
        """Fill the parameters from the streams init/<name>.weight and init/<name>.bias."""
        init_layer(self.init, self.weight, self.bias, seed, name)

    def forward(self, x_NCHW: Float[Tensor, "N I H W"], with_bias: bool = True) -> Float[Tensor, "N O H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H, W], with H and W doubled or halved by ``resample``.

        Without its bias where the next layer adds it: a pass over the whole output less.
        """
        if self.resample is not None:
            x_NCHW = self.resample(x_NCHW)
        bias = self.bias.to(x_NCHW.dtype) if with_bias else None
        return F.conv2d(x_NCHW, self.weight.to(x_NCHW.dtype), bias, padding=self.padding)


class StridedConv(Conv):
    """3x3 convolution at every other row and column: half the resolution."""

    def forward(self, x_NCHW: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H / 2, W / 2]."""
        weight, bias = self.weight.to(x_NCHW.dtype), self.bias.to(x_NCHW.dtype)
        return F.conv2d(x_NCHW, weight, bias, stride=2, padding=self.padding)


class ConvThenDown(Conv):
    """Convolution, then halving of the resolution, as one strided convolution with the two kernels convolved.

    With (1, 3, 3, 1) and 3x3 the composite is 6x6: as many operations as the 3x3 at full resolution, a quarter of the output.
    """

    def forward(self, x_NCHW: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H / 2, W / 2]."""
        taps = self.resample.filter
        weight = _convolve(_convolve(self.weight, taps, dim=2), taps, dim=3)
        padding = self.padding + (len(taps) - 1) // 2
        return F.conv2d(x_NCHW, weight.to(x_NCHW.dtype), self.bias.to(x_NCHW.dtype), stride=2, padding=padding)


def _convolve(weight_OIHW: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """Full convolution of one axis of a kernel with normalised taps, by shifted sums: no constants to copy to the device."""
    last = len(taps) - 1
    shifts = ((k, last - k) for k in range(len(taps)))
    padded = (F.pad(weight_OIHW, (0, 0, *shift) if dim == 2 else shift) for shift in shifts)
    return sum(tap / sum(taps) * part for tap, part in zip(taps, padded, strict=True))


class GroupNorm(nn.Module):
    """Group norm over min(32, C // min_group_channels) groups (at least 1), with what ``ops.group_norm`` does after it."""

    def __init__(self, num_channels: int, eps: float, min_group_channels: int = 4) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = max(1, min(MAX_GROUPS, num_channels // min_group_channels))
        if num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels do not divide into {self.num_groups} groups: use widths that are multiples of 32"
            )
        self.weight, self.bias = unset(num_channels), unset(num_channels)

    def init_weights(self, seed: int, name: str) -> None:
        """Weight 1, bias 0."""
        self.weight.fill_(1)
        self.bias.fill_(0)

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        *,
        addend_NC: Float[Tensor, "N C"] | None = None,
        scale_NC: Float[Tensor, "N C"] | None = None,
        shift_NC: Float[Tensor, "N C"] | None = None,
        silu: bool = False,
        dropout: float = 0.0,
        dropout_key: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """dropout(silu(norm(x + addend) (1 + scale) + shift)), see ``ops.group_norm``."""
        return ops.group_norm(
            x_NCHW,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            addend_NC=addend_NC,
            scale_NC=scale_NC,
            shift_NC=shift_NC,
            silu=silu,
            dropout=dropout,
            dropout_key=dropout_key,
        )


@torch.no_grad()
def store_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of all plain convolutions below ``module`` in ``dtype``, in which they are used.

    A network that is not trained then computes the same bits without a cast of each weight in every pass.
    ``ConvThenDown`` convolves its weights in fp32 before it uses them, so it keeps them.
    """
    for layer in module.modules():
        if isinstance(layer, Conv) and not isinstance(layer, ConvThenDown):
            layer.weight.data = layer.weight.to(dtype)


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter below ``module`` from streams named after it, so each layer's values stand alone."""
    for name, child in module.named_modules():
        if child is not module and hasattr(child, "init_weights"):
            child.init_weights(seed, name)
