"""What the launchers of attention share: sizes of a call, tiles that fit them, and the arguments of every kernel."""

from math import sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..runtime.launch import next_power_of_2
from ..runtime.layout import PixelLayout

# The least side of an operand of tl.dot.
MIN_TILE = 16
MAX_HEAD_DIM = 256


class Sizes(NamedTuple):
    """N images, T tokens (pixels) each, heads of D channels."""

    num: int
    tokens: int
    num_heads: int
    head_dim: int

    @classmethod
    def of(cls, qkv_NCHW: Shaped[Tensor, "N C3 H W"], num_heads: int) -> "Sizes":
        """The sizes of self-attention over these images."""
        n, channels, height, width = qkv_NCHW.shape
        return cls(n, height * width, num_heads, channels // (3 * num_heads))

    @property
    def groups(self) -> int:
        """Independent problems: heads of all images."""
        return self.num * self.num_heads

    def facts(self, dtype: torch.dtype) -> dict[str, int]:
        """What the rules of pinned launch parameters may ask about."""
        return {"tokens": self.tokens, "head_dim": self.head_dim, "itemsize": dtype.itemsize}


def cover(size: int) -> int:
    """The least side of a tile that covers ``size``."""
    return max(next_power_of_2(size), MIN_TILE)


def tile(wanted: int, size: int) -> int:
    """The side that is wanted (a power of two), but no larger than what covers ``size`` and no less than tl.dot takes."""
    return min(max(wanted, MIN_TILE), cover(size))


def shared_arguments(sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of every kernel. Products of fp32 are IEEE, of 16-bit numbers exact; both are summed in fp32."""
    return {
        "TOKENS": sizes.tokens,
        "HEADS": sizes.num_heads,
        "HEAD_DIM": sizes.head_dim,
        "SCALE": 1 / sqrt(sizes.head_dim),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def image_arguments(name: str, x_NCHW: Shaped[Tensor, "N C H W"], layout: PixelLayout) -> dict[str, Any]:
    """The kernel arguments of one image. Strides are constants: of variables the compiler knows only whether 16 divides."""
    # One image lies nowhere else, whatever its stride says.
    stride_n = layout.stride_n if len(x_NCHW) > 1 else 0
    return {f"{name}_ptr": x_NCHW, f"{name.upper()}_STRIDE_N": stride_n, f"{name.upper()}_STRIDE_P": layout.stride_p}


def query_blocks(use: dict[str, Any], sizes: Sizes) -> dict[str, int]:
    """The tiles of a kernel from its pinned parameters, each cut to the image.

    A program owns ``block_m`` tokens (queries, or keys in the kernel of dK and dV). ``full_row``: it meets all others at
    once, by chunks of ``block_d`` channels; else ``block_n`` at a time with all their channels.
    """
    blocks = {"BLOCK_M": tile(use["block_m"], sizes.tokens)}
    if use["full_row"]:
        return blocks | {"BLOCK_T": cover(sizes.tokens), "BLOCK_D": tile(use["block_d"], sizes.head_dim)}
    return blocks | {"BLOCK_N": tile(use["block_n"], sizes.tokens), "BLOCK_D": cover(sizes.head_dim)}
