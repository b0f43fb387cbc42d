"""One call of group norm as data: what all passes and both implementations of them (Triton, plain PyTorch) take."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..philox import PhiloxKey
from ..runtime.launch import as_int32
from ..runtime.layout import channels_last
from .tiling import Tiling, tiling


class Call(NamedTuple):
    """The arguments of the registered ops, in their order; see ``group_norm``. No dropout without ``index_N``."""

    x_NCHW: Float[Tensor, "N C H W"]
    num_groups: int
    weight_C: Float[Tensor, " C"]
    bias_C: Float[Tensor, " C"]
    eps: float
    addend_NC: Float[Tensor, "N C"] | None = None
    scale_NC: Float[Tensor, "N C"] | None = None
    shift_NC: Float[Tensor, "N C"] | None = None
    silu: bool = False
    dropout: float = 0.0
    index_N: Int64[Tensor, " N"] | None = None
    key0: int = 0
    key1: int = 0
    draw: int = 0

    @property
    def dropout_key(self) -> PhiloxKey | None:
        """The key of the mask; None without dropout."""
        return None if self.index_N is None else PhiloxKey((self.key0, self.key1), self.index_N, self.draw)

    @property
    def num_pixels(self) -> int:
        """H W."""
        return self.x_NCHW.shape[2] * self.x_NCHW.shape[3]

    def tiling(self, direction: str, arch: str) -> Tiling:
        """The pinned tiling of a pass."""
        channels, itemsize = self.x_NCHW.shape[1], self.x_NCHW.element_size()
        sizes = {"num_pixels": self.num_pixels, "channels": channels, "num_groups": self.num_groups}
        return tiling(direction, arch, **sizes, itemsize=itemsize, dropout=self.index_N is not None)

    def kernel_arguments(self, tile: Tiling) -> dict[str, Any]:
        """What every kernel takes, by parameter name: pointers, strides of rows, Philox words and constants."""
        x_NCHW, layout = channels_last(self.x_NCHW)
        return (
            {"x_ptr": x_NCHW, "weight_ptr": self.weight_C, "bias_ptr": self.bias_C, "index_ptr": self.index_N}
            | row_arguments(addend=self.addend_NC, scale=self.scale_NC, shift=self.shift_NC)
            | {"key0": as_int32(self.key0), "key1": as_int32(self.key1), "draw": as_int32(self.draw)}
            | {"stride_n": layout.stride_n, "STRIDE_P": layout.stride_p}
            | self._constants()
            | tile.constants(self.num_pixels, x_NCHW.shape[1], self.num_groups)
        )

    def _constants(self) -> dict[str, Any]:
        threshold = 0 if self.index_N is None else round(self.dropout * 2**32)
        return {"SILU": self.silu, "THRESHOLD": threshold, "KEPT_SCALE": 1 / (1 - self.dropout) if threshold else 1.0}


def row_arguments(**rows_NC: Float[Tensor, "N C"] | None) -> dict[str, Any]:
    """Pointer and row stride of optional vectors per sample, which may be slices of longer rows."""
    readable = {name: row if row is None or row.stride(1) == 1 else row.contiguous() for name, row in rows_NC.items()}
    pointers = {f"{name}_ptr": row for name, row in readable.items()}
    return pointers | {f"{name}_stride": 0 if row is None else row.stride(0) for name, row in readable.items()}


def compute_dtype(x_NCHW: Float[Tensor, "N C H W"]) -> torch.dtype:
    """fp32, or fp64 for fp64 images."""
    return torch.promote_types(x_NCHW.dtype, torch.float32)


class Gradients(NamedTuple):
    """The gradients of a call, or where to write them; None for what nobody needs. dx is dense channels_last.

    The Triton kernels write that of weight together with that of bias, and that of addend only with that of x.
    """

    dx_NCHW: Float[Tensor, "N C H W"] | None = None
    dweight_C: Float[Tensor, " C"] | None = None
    dbias_C: Float[Tensor, " C"] | None = None
    daddend_NC: Float[Tensor, "N C"] | None = None
    dscale_NC: Float[Tensor, "N C"] | None = None
    dshift_NC: Float[Tensor, "N C"] | None = None


class Tangents(NamedTuple):
    """The tangents of x and of the optional addend, scale and shift; None means zero."""

    tx_NCHW: Float[Tensor, "N C H W"]
    taddend_NC: Float[Tensor, "N C"] | None = None
    tscale_NC: Float[Tensor, "N C"] | None = None
    tshift_NC: Float[Tensor, "N C"] | None = None
