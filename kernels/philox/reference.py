"""Philox4x32-10 in plain PyTorch: the integers that every backend must reproduce bit for bit.

Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
Shapes: N samples, E elements of one sample, B = ceil(E / 4) Philox blocks.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
WORD_MASK = 0xFFFFFFFF
LANES = 4
CPU_CHUNK_BLOCKS = 65536  # a hundred passes over memory are quick only inside the cache

# 32-bit unsigned values in int64, because PyTorch computes little in uint32.
Words = Int64[Tensor, "..."]


class PhiloxKey(NamedTuple):
    """Which random numbers: the 64-bit key, the draw number and one global sample index per row.

    ``draw`` separates draws of one purpose from each other (a dropout layer, a sampler step).
    ``index_N`` is int64 and lives on the device that draws; the other fields are Python integers, so a captured
    CUDA graph sees new samples by new contents of ``index_N`` alone.
    """

    key: tuple[int, int]
    index_N: Int64[Tensor, " N"]
    draw: int = 0

    def at(self, draw: int) -> "PhiloxKey":
        """The same samples and purpose with another draw number."""
        return self._replace(draw=draw)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten Philox rounds on four counter words, each an int64 tensor holding a 32-bit unsigned value.

    round: (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); k += W (mod 2^32).
    SC 2011, section 3.3. int64 products wrap modulo 2^64, so their bit pattern is the exact unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        # The products stand in for their low words: what lies above 32 bits is masked where it is used.
        c0, c1, c2, c3 = _next(p1, c1, k0), p1, _next(p0, c3, k1), p0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD_MASK, (k1 + KEY_INCREMENTS[1]) & WORD_MASK
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def _next(product: Tensor, word: Tensor, key: int) -> Tensor:
    """hi(product) ^ word ^ key."""
    return ((product >> 32) ^ word).bitwise_xor_(key).bitwise_and_(WORD_MASK)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & WORD_MASK


def random_bits(key: PhiloxKey, num_elements: int) -> Int64[Tensor, "N E"]:
    """32 random bits for each of ``num_elements`` elements of each sample: int64 [N, E] in [0, 2^32).

    Element e of the sample with global index i is lane e % 4 of philox(counter, key) with
    counter = (e // 4, draw, i mod 2^32, i div 2^32).
    """
    num_blocks = -(-num_elements // LANES)
    rows = max(1, CPU_CHUNK_BLOCKS // max(num_blocks, 1))
    if key.index_N.device.type == "cpu" and len(key.index_N) > rows and not torch.compiler.is_compiling():
        parts = (random_bits(key._replace(index_N=part), num_elements) for part in key.index_N.split(rows))
        return torch.cat(list(parts))
    index_N1, block_1B = key.index_N[:, None], torch.arange(num_blocks, device=key.index_N.device)[None, :]
    counter = (block_1B, block_1B.new_full((1, 1), key.draw), index_N1 & WORD_MASK, _high(index_N1))
    return torch.stack(philox4x32(counter, key.key), dim=-1).flatten(1)[:, :num_elements]


def random_dropout(x_NCHW: Float[Tensor, "N C H W"], p: float, key: PhiloxKey | None) -> Float[Tensor, "N C H W"]:
    """Dropout by the key's random bits, keyed so that any kernel can draw the same mask again.

    Element e = (h W + w) C + c of a sample is kept and divided by 1 - p when bits(key)[n, e] >= round(p 2^32), else 0.

    No dropout without a key; arXiv 1207.0580.
    """
    if key is None or p == 0:
        return x_NCHW
    n, channels, height, width = x_NCHW.shape
    keep = random_bits(key, height * width * channels) >= round(p * 2**32)
    return torch.where(keep.reshape(n, height, width, channels).permute(0, 3, 1, 2), x_NCHW / (1 - p), 0)


def random_normal(key: PhiloxKey, num_elements: int) -> Float32[Tensor, "N E"]:
    """Standard normal fp32 [N, E] by Box and Muller: lanes (2j, 2j+1) of one block give

    n_2j = sqrt(-2 ln u) cos(2 pi v), n_2j+1 = sqrt(-2 ln u) sin(2 pi v), u = (b_2j + 1/2) / 2^32, v = b_2j+1 / 2^32.
    u is never 0, so every value is finite; the largest magnitude is 6.77.
    """
    return box_muller(random_bits(key, -(-num_elements // 2) * 2))[:, :num_elements]


def box_muller(bits_NE: Int64[Tensor, "N E"]) -> Float32[Tensor, "N E"]:
    """Pairs of normals from pairs of 32-bit words, E even; u and v are rounded to fp32, so u can be 1."""
    bits = bits_NE.to(torch.float32)
    u, v = (bits[:, 0::2] + 0.5) * 2.0**-32, bits[:, 1::2] * 2.0**-32
    radius, angle = (-2.0 * u.log()).sqrt(), v * (2.0 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
