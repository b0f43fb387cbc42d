"""EDM2's magnitude-preserving U-Net (arXiv 2312.02696, Appendix B, configuration G)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm import ops
from fastcm.kernels.philox import PhiloxKey, random_dropout
from fastcm.nn.blocks import Context
from fastcm.nn.magnitude_preserving import (
    EPS,
    SILU_MAGNITUDE,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    sum_weights,
)
from fastcm.nn.network import Network, level_name, level_resolutions

BOX = (1.0, 1.0)
CHANNELS = (1,)


class MPBlock(nn.Module):
    """Residual block, then self-attention with normalised q, k and v; arXiv 2312.02696, Figure 21 and Appendix B.

    encoder: x <- pixelnorm(skip(resample(x))), x <- mp_sum(x, h); decoder: x <- mp_sum(skip(x), h) of the resampled x;
    h = conv1(dropout(mp_silu(conv0(mp_silu(x)) (1 + emb_gain W_emb emb)))). Then x <- mp_sum(x, proj(att(qkv))), clipped.
    Constant factors of mp_silu, and that of h in its sum, are part of the next convolution's weights, not of an activation.
    There is no attention where ``channels_per_head`` exceeds the width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.encoder, self.resample = in_channels, out_channels, encoder, resample
        self.dropout, self.site, self.clip_act = dropout, 0, clip_act
        self.res_weights, self.attn_weights = sum_weights(res_balance), sum_weights(attn_balance)
        self.num_heads = out_channels // channels_per_head if attention else 0

        self.emb_gain = nn.Parameter(torch.full((), torch.nan))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if self.num_heads:
            if out_channels % self.num_heads:
                raise ValueError(f"{out_channels} channels do not divide into {self.num_heads} attention heads")
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def init_weights(self, seed: int, name: str) -> None:
        """The embedding has no effect at first; the layers have their own weights."""
        self.emb_gain.fill_(0)

    def forward(self, x_NCHW: Float[Tensor, "N C H W"], context: Context) -> Float[Tensor, "N C2 H2 W2"]:
        """[N, in_channels, H, W] to [N, out_channels, H', W'] in the dtype of x."""
        if self.resample is not None:
            x_NCHW = ops.resample(x_NCHW, BOX, self.resample == "up")
        if self.encoder:
            x_NCHW = normalize(self._shortcut(x_NCHW), CHANNELS)
        shortcut = x_NCHW if self.encoder else self._shortcut(x_NCHW)
        x_NCHW = shortcut * self.res_weights[0] + self._residual(x_NCHW, context)
        return self._attend(x_NCHW).clamp(-self.clip_act, self.clip_act)

    def emb_weight(self) -> Float[Tensor, "O E"]:
        """The effective weights of the linear map of the embedding, which the network applies for all its blocks."""
        return self.emb_linear.effective_weight(self.emb_gain)

    def _shortcut(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW if self.conv_skip is None else self.conv_skip(x_NCHW)

    def _residual(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """The residual branch times its weight in the sum."""
        key = None if context.dropout is None else context.dropout.at(self.site)
        scale_NC = context.affine_NA[self.site].to(x_NCHW.dtype)
        h = self.conv_res0(F.silu(x_NCHW), gain=1 / SILU_MAGNITUDE)
        h = random_dropout(F.silu(h * scale_NC[:, :, None, None]), self.dropout, key)
        return self.conv_res1(h, gain=self.res_weights[1] / SILU_MAGNITUDE)

    def _attend(self, x_NCHW: Tensor) -> Tensor:
        if not self.num_heads:
            return x_NCHW
        vectors = self.attn_qkv(x_NCHW).unflatten(1, (3 * self.num_heads, -1))
        attended = ops.attention(normalize(vectors, (2,)).flatten(1, 2), self.num_heads)
        return x_NCHW * self.attn_weights[0] + self.attn_proj(attended, gain=self.attn_weights[1])


class EDM2UNet(Network):
    """The raw network F(x, c_noise, labels) of EDM2, and the log variance u(c_noise) of its loss; arXiv 2312.02696.

    channel_mult: width of each resolution level in units of model_channels; each level halves the resolution.
    channel_mult_noise, channel_mult_emb: widths of the noise embedding and of the embedding that blocks see, in the same
    units, 0 for those of the first and of the widest level. attn_resolutions: where blocks have self-attention (the first
    block at the bottom of the decoder has it in any case). label_balance, concat_balance, res_balance, attn_balance: t of
    the sums and concatenations. dropout: probability at the one site of each block of at most dropout_max_resolution (0:
    of any), applied only when forward gets a key. logvar_channels: features of u, 0 for a network without it.

    Parameter names are the official ones. Parameters are fp32 and NaN until ``init_weights`` or ``load_state_dict``. The
    torso computes in the dtype of x, the embedding in that of the parameters. Raises ValueError for sizes that cannot work.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int = 0,
        channel_mult_emb: int = 0,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        logvar_channels: int = 128,
        dropout: float = 0.0,
        dropout_max_resolution: int = 0,
        channels_per_head: int = 64,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
    ) -> None:
        super().__init__()
        self.resolutions = level_resolutions(img_resolution, len(channel_mult))
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.num_blocks, self.attn_resolutions = num_blocks, frozenset(attn_resolutions)
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.dropout, self.dropout_max_resolution = dropout, dropout_max_resolution or img_resolution

        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise or widths[0]
        self.emb_channels = model_channels * channel_mult_emb or max(widths)
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, self.emb_channels)
        self.emb_label = MPConv(label_dim, self.emb_channels) if label_dim else None
        balances = {"res_balance": res_balance, "attn_balance": attn_balance}
        self._block_options = {"channels_per_head": channels_per_head, "clip_act": clip_act, **balances}
        self._build_decoder(widths, self._build_encoder(widths))
        self.out_conv = MPConv(widths[0], img_channels, 3)
        self.out_gain = nn.Parameter(torch.full((), torch.nan))
        self.logvar_fourier = MPFourier(logvar_channels) if logvar_channels else None
        self.logvar_linear = MPConv(logvar_channels, 1) if logvar_channels else None

        self._blocks = [module for module in self.modules() if isinstance(module, MPBlock)]
        self._layers = [module for module in self.modules() if isinstance(module, MPConv)]
        for site, block in enumerate(self._blocks):
            block.site = site

    @torch.no_grad()
    def init_weights(self, seed: int) -> "EDM2UNet":
        """Unit normal weights from Stream(seed, "init/<parameter name>"), gains 0, so the first output is 0."""
        super().init_weights(seed)
        self.out_gain.fill_(0)
        return self

    @torch.no_grad()
    def constrain_weights(self, finite: Float[Tensor, ""]) -> None:
        """Forced weight normalisation: overwrite all weights v by v / (eps + ||v_i|| / sqrt(n)); arXiv 2312.02696, Eq. 66.

        Official training does this at the start of every forward pass in training mode. Between two optimizer steps it
        changes the stored weights once (where gradients are accumulated, further passes only shrink them by eps), so once
        after each optimizer step, plus once on the weights that training starts from, gives the same stored weights in every
        forward pass, the same gradients and the same updates. Averages see what they see there too: the weights after the
        optimizer step and before this. A pass without gradient (a teacher, a sampler) writes nothing.

        Where ``finite`` is 0 no bit changes. Nothing waits for the device; two launches per layer and a few for all of them.
        """
        norms = [layer.norm().flatten() for layer in self._layers]
        magnitudes = torch.cat(torch._foreach_div(norms, [math.sqrt(layer.fan_in) for layer in self._layers]))
        # A product by exactly 1 leaves every bit alone, which compiled division does not promise.
        factors = torch.where(finite > 0, 1 / (magnitudes + EPS), 1).split([len(norm) for norm in norms])
        for layer, factor_O in zip(self._layers, factors, strict=True):
            layer.weight.mul_(factor_O.reshape(-1, *[1] * (layer.weight.ndim - 1)))

    def log_variance(self, c_noise_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """u(sigma), the learned log variance of the loss; arXiv 2312.02696, Eq. 21. ValueError without ``logvar_channels``."""
        if self.logvar_linear is None:
            return super().log_variance(c_noise_N)
        return self.logvar_linear(self.logvar_fourier(c_noise_N.to(self.logvar_linear.weight.dtype))).squeeze(1)

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """F(x; c_noise), channels_last, in the dtype of x.

        labels: one-hot rows [N, label_dim], None for rows of zeros (no class). dropout: key of the masks, None for no
        dropout. There are no augmentation labels and no second time. Raises ValueError for what does not fit.
        """
        self.check_inputs(x_NCHW, second_N, labels, augment)
        context = Context(self._project(self.embed(c_noise_N, labels)), dropout)
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        return self._decode(*self._encode(x_NCHW, context), context)

    def embed(self, c_noise_N: Float[Tensor, " N"], labels: Float[Tensor, "N L"] | None = None) -> Float[Tensor, "N E"]:
        """What the blocks see of noise level and class, [N, E]."""
        dtype = self.emb_noise.weight.dtype
        emb_NE = self.emb_noise(self.emb_fourier(c_noise_N.to(dtype)))
        if self.emb_label is not None:
            label_NE = (
                torch.zeros_like(emb_NE) if labels is None else self.emb_label(labels.to(dtype), math.sqrt(self.label_dim))
            )
            emb_NE = mp_sum(emb_NE, label_NE, self.label_balance)
        return mp_silu(emb_NE)

    def _project(self, emb_NE: Tensor) -> tuple[Tensor, ...]:
        """1 + the linear maps of all blocks, in the order of their sites, as one matrix product."""
        weights = [block.emb_weight() for block in self._blocks]
        scale_NA = F.linear(emb_NE, torch.cat(weights)) + 1
        return scale_NA.split([len(weight) for weight in weights], dim=1)

    def _encode(self, x_NCHW: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """From full to lowest resolution; the second result is what the decoder reads, in the order of making."""
        skips = []
        x_NCHW = F.pad(x_NCHW, (0, 0, 0, 0, 0, 1), value=1.0)  # in place of biases, a channel of ones
        for layer in self.enc.values():
            x_NCHW = layer(x_NCHW, context) if isinstance(layer, MPBlock) else layer(x_NCHW)
            skips.append(x_NCHW)
        return x_NCHW, skips

    def _decode(self, x_NCHW: Tensor, skips: list[Tensor], context: Context) -> Tensor:
        """From lowest to full resolution, then to the image."""
        for name, block in self.dec.items():
            if "_block" in name:
                x_NCHW = mp_cat(x_NCHW, skips.pop(), self.concat_balance)
            x_NCHW = block(x_NCHW, context)
        return self.out_conv(x_NCHW, gain=self.out_gain)

    def _build_encoder(self, widths: list[int]) -> list[int]:
        """Fill ``enc`` and return the widths of what the decoder reads, in the order of making."""
        self.enc = nn.ModuleDict()
        self.enc[level_name(self.resolutions[0], "conv")] = MPConv(self.img_channels + 1, widths[0], 3)
        skip_widths = [widths[0]]
        for resolution, width in zip(self.resolutions, widths, strict=True):
            if resolution != self.resolutions[0]:
                before = skip_widths[-1]
                self.enc[level_name(resolution, "down")] = self._block(resolution, before, before, "enc", resample="down")
                skip_widths.append(before)
            for index in range(self.num_blocks):
                attention = resolution in self.attn_resolutions
                block = self._block(resolution, skip_widths[-1], width, "enc", attention=attention)
                self.enc[level_name(resolution, f"block{index}")] = block
                skip_widths.append(width)
        return skip_widths

    def _build_decoder(self, widths: list[int], skip_widths: list[int]) -> None:
        self.dec = nn.ModuleDict()
        before = skip_widths[-1]
        for resolution, width in reversed(list(zip(self.resolutions, widths, strict=True))):
            if resolution == self.resolutions[-1]:
                self.dec[level_name(resolution, "in0")] = self._block(resolution, before, before, "dec", attention=True)
                self.dec[level_name(resolution, "in1")] = self._block(resolution, before, before, "dec")
            else:
                self.dec[level_name(resolution, "up")] = self._block(resolution, before, before, "dec", resample="up")
            for index in range(self.num_blocks + 1):
                attention = resolution in self.attn_resolutions
                block = self._block(resolution, before + skip_widths.pop(), width, "dec", attention=attention)
                self.dec[level_name(resolution, f"block{index}")] = block
                before = width

    def _block(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        flavor: Literal["enc", "dec"],
        *,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> MPBlock:
        return MPBlock(
            in_channels,
            out_channels,
            self.emb_channels,
            encoder=flavor == "enc",
            resample=resample,
            attention=attention,
            dropout=self.dropout if resolution <= self.dropout_max_resolution else 0.0,
            **self._block_options,
        )
