"""Operations that keep the expected magnitude of activations, and layers whose weights have a fixed one.

Reference: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, Appendix B.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.nn.init import draw, fans, unset
from fastcm.random import Stream

EPS = 1e-4
# silu(x) of a unit normal x has this root mean square.
SILU_MAGNITUDE = 0.596


def normalize(x: Float[Tensor, "..."], dims: tuple[int, ...], eps: float = EPS) -> Float[Tensor, "..."]:
    """x / (eps + ||x|| / sqrt(n)), the norm over the n elements along ``dims``: unit root mean square.

    arXiv 2312.02696, Eq. 30 (pixel norm, dims = channels) and Eq. 66 (weights). Statistics are fp32 or better; the result has
    the dtype of x.
    """
    num = math.prod([x.shape[dim] for dim in dims])
    return x / (norm_over(x, dims) / math.sqrt(num) + eps).to(x.dtype)


def norm_over(x: Float[Tensor, "..."], dims: tuple[int, ...]) -> Float[Tensor, "..."]:
    """The Euclidean norm over ``dims``, which are kept with size 1, in fp32 or better."""
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def mp_silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """silu(x) / 0.596; arXiv 2312.02696, Eq. 81."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Float[Tensor, "..."], b: Float[Tensor, "..."], t: float) -> Float[Tensor, "..."]:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2); arXiv 2312.02696, Eq. 88."""
    weight_a, weight_b = sum_weights(t)
    # Not torch.add(alpha=...): Inductor drops alpha where b is a matrix product (PyTorch 2.14).
    return a * weight_a + b * weight_b


def sum_weights(t: float) -> tuple[float, float]:
    """The factors of both terms of ``mp_sum``; squared they add up to 1."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_cat(a: Float[Tensor, "N A H W"], b: Float[Tensor, "N B H W"], t: float) -> Float[Tensor, "N C H W"]:
    """sqrt((N_a + N_b) / ((1 - t)^2 + t^2)) [(1 - t) / sqrt(N_a) a, t / sqrt(N_b) b] of N_a and N_b channels.

    b contributes the share t to what follows, however many channels it has; arXiv 2312.02696, Eq. 103.
    """
    weights, widths = sum_weights(t), (a.shape[1], b.shape[1])
    factors = [weight * math.sqrt(sum(widths) / width) for weight, width in zip(weights, widths, strict=True)]
    # Halves of equal width at t = 1/2, most of a decoder, need no pass of their own.
    parts = (x if math.isclose(factor, 1) else x * factor for x, factor in zip((a, b), factors, strict=True))
    return torch.cat(list(parts), dim=1)


class MPFourier(nn.Module):
    """sqrt(2) cos(f_i x + phi_i) with f_i ~ 2 pi N(0, 1), phi_i ~ 2 pi U(0, 1) drawn once; arXiv 2312.02696, Eq. 75.

    Frequencies and phases are buffers: saved with the network, never trained.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.full((num_channels,), math.nan))
        self.register_buffer("phases", torch.full((num_channels,), math.nan))

    def init_weights(self, seed: int, name: str) -> None:
        """Draw the buffers from the streams init/<name>.freqs and init/<name>.phases."""
        only, shape = torch.zeros(1, dtype=torch.int64, device=self.freqs.device), tuple(self.freqs.shape)
        self.freqs.copy_(2 * math.pi * Stream(seed, f"init/{name}.freqs").normal(only, shape)[0])
        self.phases.copy_(2 * math.pi * Stream(seed, f"init/{name}.phases").uniform(only, shape)[0])

    def forward(self, x_N: Float[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """[N] to [N, num_channels]."""
        angle_NE = x_N[:, None] * self.freqs.to(x_N.dtype) + self.phases.to(x_N.dtype)
        return angle_NE.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution, or linear layer (kernel 0), without bias, by rows of fixed magnitude; arXiv 2312.02696, Eq. 47.

    y = x * w, w_i = gain / sqrt(n) v_i / (||v_i|| / sqrt(n) + eps) = gain v_i / (||v_i|| + eps sqrt(n)), v_i the stored weights
    of output i and n their number: unit normal activations stay so. The gradient, through the norm, is orthogonal to v_i.
    Forward never writes v; ``EDM2UNet.constrain_weights`` brings it back to unit magnitude after each optimizer step.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = unset(out_channels, in_channels, *((kernel, kernel) if kernel else ()))

    def init_weights(self, seed: int, name: str) -> None:
        """Unit normal weights from the stream init/<name>.weight."""
        self.weight.copy_(draw("kaiming_normal", 1.0, self.weight, 1, 1, Stream(seed, f"init/{name}.weight")))

    @property
    def fan_in(self) -> int:
        """n, the number of weights of one output."""
        return fans(self.weight.shape)[0]

    def norm(self) -> Float[Tensor, "O ..."]:
        """||v_i|| of each output, [O, 1, ...]."""
        return norm_over(self.weight, tuple(range(1, self.weight.ndim)))

    def effective_weight(self, gain: float | Float[Tensor, ""] = 1.0) -> Float[Tensor, "O ..."]:
        """w, in the dtype of the parameter."""
        return self.weight * (gain / (self.norm() + EPS * math.sqrt(self.fan_in)))

    def forward(self, x: Float[Tensor, "N I ..."], gain: float | Float[Tensor, ""] = 1.0) -> Float[Tensor, "N O ..."]:
        """[N, in_channels, ...] to [N, out_channels, ...] in the dtype of x; the gain goes into the weights."""
        weight = self.effective_weight(gain).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
