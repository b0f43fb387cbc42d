"""Embeddings of the noise level: sinusoids of fixed or of random frequencies, always in fp32 or better."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.nn.init import draw
from fastcm.random import Stream

MAX_PERIOD = 10000.0


class PositionalEmbedding(nn.Module):
    """Sinusoids of geometrically spaced frequencies.

    (cos(w_i x), sin(w_i x)) for w_i = 10000^(-i / (n - e)), i < n = num_channels / 2, e = 1 with ``endpoint``, else 0;
    arXiv 1706.03762, section 3.5. ``sin_first`` exchanges the two halves. rounding: whether w_i is computed as a "power"
    or as "exp"(-i ln(10000) / (n - e)); with x up to 1553 their last bits show.
    """

    def __init__(self, num_channels: int, endpoint: bool, sin_first: bool, rounding: Literal["power", "exp"] = "power") -> None:
        super().__init__()
        self.num_frequencies, self.endpoint, self.sin_first = num_channels // 2, endpoint, sin_first
        self.rounding = rounding

    def forward(self, x_N: Float[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """[N] to [N, num_channels]."""
        # fp32 like the published networks, also where the rest of the network is fp64.
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=x_N.device)
        last = max(self.num_frequencies - self.endpoint, 1)
        if self.rounding == "power":
            frequencies = (1 / MAX_PERIOD) ** (index / last)
        else:
            frequencies = (-math.log(MAX_PERIOD) * index / last).exp()
        return _sinusoids(x_N[:, None] * frequencies.to(x_N.dtype), self.sin_first)


class FourierEmbedding(nn.Module):
    """Sinusoids of random frequencies: (cos(2 pi f_i x), sin(2 pi f_i x)) with f_i ~ N(0, scale^2) drawn once.

    arXiv 2006.10739, section 4. The frequencies are a buffer: saved with the network, never trained.
    ``sin_first`` exchanges the two halves.
    """

    def __init__(self, num_channels: int, scale: float, sin_first: bool) -> None:
        super().__init__()
        self.scale, self.sin_first = scale, sin_first
        self.register_buffer("freqs", torch.full((num_channels // 2,), math.nan))

    def init_weights(self, seed: int, name: str) -> None:
        """Draw the frequencies from the stream init/<name>.freqs."""
        stream = Stream(seed, f"init/{name}.freqs")
        self.freqs.copy_(draw("kaiming_normal", self.scale, self.freqs, 1, 1, stream))

    def forward(self, x_N: Float[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """[N] to [N, num_channels]."""
        return _sinusoids(x_N[:, None] * (2 * math.pi * self.freqs).to(x_N.dtype), self.sin_first)


def _sinusoids(angle_NE: Tensor, sin_first: bool) -> Tensor:
    cos, sin = angle_NE.cos(), angle_NE.sin()
    return torch.cat([sin, cos] if sin_first else [cos, sin], dim=1)
