"""Counter-based random streams: every random number is a pure function of (seed, purpose, sample index, element).

Nothing has a state, so a resumed run, another world size, a replayed CUDA graph and the teacher's second forward pass
all see the same numbers by construction. There is no other source of randomness in fastcm.
"""

import zlib
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from fastcm.kernels.philox import PhiloxKey, random_bits, random_normal

MAX_SEED = 2**32 - 1


@torch.compiler.assume_constant_result
def _purpose_word(purpose: str) -> int:
    return zlib.crc32(purpose.encode())  # a graph takes it as a constant


@dataclass(frozen=True)
class Stream:
    """Random numbers for one purpose, keyed by Philox4x32-10 with key (seed, crc32(purpose)).

    Arguments: seed in [0, 2^32); purpose, a name such as "noise" that no other use shares. Each method takes
    ``index_N`` (int64 global sample indices), the shape drawn per sample and a draw number that tells repeated draws
    of one purpose apart; it returns a tensor [N, *shape] on the device of ``index_N``.
    Raises ValueError for a seed out of range.
    """

    seed: int
    purpose: str

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed {self.seed} is outside [0, 2^32)")

    @property
    def key(self) -> tuple[int, int]:
        """The two 32-bit words of the Philox key."""
        return self.seed, _purpose_word(self.purpose)

    def at(self, index_N: Int64[Tensor, " N"], draw: int = 0) -> PhiloxKey:
        """The key that kernels take to draw for these samples themselves (dropout masks, noise)."""
        return PhiloxKey(self.key, index_N, draw)

    def bits(self, index_N: Int64[Tensor, " N"], shape: tuple[int, ...] = (), draw: int = 0) -> Int64[Tensor, "N ..."]:
        """32 random bits as int64 in [0, 2^32)."""
        return random_bits(self.at(index_N, draw), prod(shape)).reshape(-1, *shape)

    def uniform(self, index_N: Int64[Tensor, " N"], shape: tuple[int, ...] = (), draw: int = 0) -> Float32[Tensor, "N ..."]:
        """Uniform in [0, 1): u = floor(bits / 2^8) / 2^24, exact in fp32."""
        return (self.bits(index_N, shape, draw) >> 8).to(torch.float32) * 2.0**-24

    def normal(self, index_N: Int64[Tensor, " N"], shape: tuple[int, ...] = (), draw: int = 0) -> Float32[Tensor, "N ..."]:
        """Standard normal by Box and Muller."""
        return random_normal(self.at(index_N, draw), prod(shape)).reshape(-1, *shape)

    def bernoulli(
        self, index_N: Int64[Tensor, " N"], p: float, shape: tuple[int, ...] = (), draw: int = 0
    ) -> Bool[Tensor, "N ..."]:
        """True with probability p, by the integer comparison bits < round(p 2^32)."""
        return self.bits(index_N, shape, draw) < round(p * 2**32)

    def integers(
        self, index_N: Int64[Tensor, " N"], high: int, shape: tuple[int, ...] = (), draw: int = 0
    ) -> Int64[Tensor, "N ..."]:
        """Integers in [0, high), high <= 2^31: floor(bits * high / 2^32); the bias is below high / 2^32."""
        if not 0 < high <= 2**31:
            raise ValueError(f"integers in [0, {high}) cannot be drawn: high must be in [1, 2^31]")
        return (self.bits(index_N, shape, draw) * high) >> 32

    def image_normal(
        self, index_N: Int64[Tensor, " N"], image_shape: tuple[int, int, int], draw: int = 0
    ) -> Float32[Tensor, "N C H W"]:
        """Standard normal images of shape (C, H, W), channels_last in memory; elements count in (H, W, C) order."""
        channels, height, width = image_shape
        return self.normal(index_N, (height, width, channels), draw).permute(0, 3, 1, 2)
