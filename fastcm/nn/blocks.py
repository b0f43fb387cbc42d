"""The residual block of the U-Nets (arXiv 2206.00364, Appendix F.2) with optional resampling and self-attention."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from fastcm import ops
from fastcm.kernels.philox import PhiloxKey
from fastcm.nn.families import Family
from fastcm.nn.init import Init
from fastcm.nn.layers import Conv, GroupNorm, Linear, Resample, StridedConv


class Context(NamedTuple):
    """What the blocks of one forward pass are told: each ``site``'s affine map of the embeddings, and the key for dropout."""

    affine_NA: Sequence[Tensor]
    dropout: PhiloxKey | None = None


class Block(nn.Module):
    """Residual block, then self-attention where there are ``num_heads``.

    h = conv1(dropout(silu(mod(norm1(conv0(silu(norm0(x)))))));  x <- (h + skip(x)) s;  x <- (proj(att(qkv(norm2(x)))) + x) s

    mod adds affine(emb) before the norm, or scales by 1 + its first half and shifts by its second half after it
    (``family.adaptive_scale``); s = ``family.skip_scale``. ``resample`` changes the resolution in conv0 and in the
    shortcut. ``site`` numbers this block among those of its network. With ``second_init``, its first weights, there is
    an affine_s whose output of the second embedding is added to that of affine; the network applies both for all its blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        family: Family,
        *,
        dropout: float = 0.0,
        resample: Literal["up", "down"] | None = None,
        num_heads: int = 0,
        second_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.site = dropout, 0
        self.adaptive_scale, self.skip_scale = family.adaptive_scale, family.skip_scale
        self.num_heads = num_heads

        init, norm = family.init, partial(GroupNorm, eps=family.eps, min_group_channels=family.min_group_channels)
        scaling = None if resample is None else Resample(family.resample_filter, up=resample == "up")
        affine_channels = out_channels * (2 if family.adaptive_scale else 1)
        self.norm0 = norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, init.layer, scaling)
        self.affine = Linear(emb_channels, affine_channels, init.layer)
        self.affine_s = None if second_init is None else Linear(emb_channels, affine_channels, second_init)
        self.norm1 = norm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, init.output)

        self.skip = scaling
        if in_channels != out_channels or (scaling is not None and family.resample_proj):
            self.skip = Conv(in_channels, out_channels, 1, init.layer, scaling)

        if num_heads:
            if out_channels % num_heads:
                raise ValueError(f"{out_channels} channels do not divide into {num_heads} attention heads")
            self.norm2 = norm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1, init.qkv)
            self.proj = Conv(out_channels, out_channels, 1, init.output)

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], context: Context) -> Float[Tensor, "N C2 H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H', W'] in the dtype of x."""
        return self.second_half(*self.first_half(x_NCHW, context))

    def first_half(
        self, x_NCHW: Float[Tensor, "N C H W"], context: Context
    ) -> tuple[Float[Tensor, "N C2 H2 W2"], Float[Tensor, "N C2 H2 W2"]]:
        """The input of conv1, and skip(x)."""
        key = None if context.dropout is None else context.dropout.at(self.site)
        modulation = self._modulation(context.affine_NA[self.site])
        h = self.conv0(self.norm0(x_NCHW, silu=True), with_bias=False)
        h = self.norm1(h, silu=True, dropout=self.dropout, dropout_key=key, **modulation)
        return h, x_NCHW if self.skip is None else self.skip(x_NCHW)

    def second_half(
        self, h: Float[Tensor, "N C2 H2 W2"], shortcut_NCHW: Float[Tensor, "N C2 H2 W2"]
    ) -> Float[Tensor, "N C2 H2 W2"]:
        """The block's output of what ``first_half`` returns; depends on no condition."""
        return self._attend(self._scale(self.conv1(h) + shortcut_NCHW))

    @property
    def affine_bias(self) -> Tensor:
        """The bias of the affine map; where that is added before the norm, with the bias of conv0, which is added there too."""
        return self.affine.bias if self.adaptive_scale else self.affine.bias + self.conv0.bias

    def _modulation(self, affine_NA: Tensor) -> dict[str, Tensor]:
        """What norm1 does before and after normalising; the bias of conv0 is part of it."""
        if not self.adaptive_scale:
            return {"addend_NC": affine_NA}
        scale_NC, shift_NC = affine_NA.chunk(2, dim=1)
        return {"addend_NC": self.conv0.bias.expand(len(affine_NA), -1), "scale_NC": scale_NC, "shift_NC": shift_NC}

    def _attend(self, x_NCHW: Tensor) -> Tensor:
        if not self.num_heads:
            return x_NCHW
        attended = ops.attention(self.qkv(self.norm2(x_NCHW)), self.num_heads)
        return self._scale(self.proj(attended) + x_NCHW)

    def _scale(self, sum_NCHW: Tensor) -> Tensor:
        """In place: no one else needs the sum of a branch and its shortcut."""
        return sum_NCHW if self.skip_scale == 1 else sum_NCHW.mul_(self.skip_scale)


class LastBlock(nn.Module):
    """The end of a U-Net from conv1 of its last block on: head(silu(norm(second_half(h, shortcut)))).

    Its parameters, conv1's first, are the network's own, those before conv1 not among them.
    """

    def __init__(self, block: Block, norm: GroupNorm, head: Conv) -> None:
        super().__init__()
        self.conv1 = block.conv1
        self.attention = nn.ModuleList((block.norm2, block.qkv, block.proj) if block.num_heads else ())
        self.norm, self.head = norm, head
        self._second_half = block.second_half

    def forward(self, features_NCHW: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N O H W"]:
        """F of both results of the block's ``first_half``, side by side."""
        return self.head(self.norm(self._second_half(*features_NCHW.chunk(2, dim=1)), silu=True))


class PlainDown(StridedConv):
    """What stands in the place of a halving block where ``family.resample_layers`` is "conv"."""

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], context: Context) -> Float[Tensor, "N C H2 W2"]:
        """[N, C, H, W] to [N, C, H / 2, W / 2]; the condition has no part in it."""
        return super().forward(x_NCHW)


class PlainUp(Conv):
    """What stands in the place of a doubling block where ``family.resample_layers`` is "conv"."""

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], context: Context) -> Float[Tensor, "N C H2 W2"]:
        """[N, C, H, W] to [N, C, 2 H, 2 W]; the condition has no part in it."""
        return super().forward(x_NCHW)
