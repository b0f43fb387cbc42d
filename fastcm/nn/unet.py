"""One U-Net: DDPM++, NCSN++ and ADM as EDM has them, and OpenAI's, are values of ``Family`` (arXiv 2206.00364, F.2)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fastcm.kernels.philox import PhiloxKey
from fastcm.nn.blocks import Block, Context, LastBlock, PlainDown, PlainUp
from fastcm.nn.embeddings import FourierEmbedding, PositionalEmbedding
from fastcm.nn.families import FAMILIES, Family
from fastcm.nn.init import ZEROS
from fastcm.nn.layers import Conv, ConvThenDown, GroupNorm, Linear, Resample, linear_of_all
from fastcm.nn.network import Cut, Network, level_name, level_resolutions

NEAREST = (1.0, 1.0)


class UNet(Network):
    """The raw network F(x, c_noise, labels, augment) of arXiv 2206.00364, Eq. 7, of any family, resolution and width.

    family: a name in ``FAMILIES`` or a ``Family``. channel_mult: width of each resolution level in units of
    model_channels; each level halves the resolution. attn_resolutions: where blocks have self-attention (the two blocks
    at the bottom have one in any case). dropout: probability at the one site of each block, applied only when forward
    gets a key; at resolutions above dropout_max_resolution there is none (0: no such limit). label_dim, augment_dim:
    widths of the conditions, 0 for none. fourier_scale overrides the family's. second_time adds a second noise level
    (arXiv 2310.02279: jump from t to s). second_time_init: whether each block's layer of its embedding begins at "zero", so
    that it has no effect before training, or "random" like the one of the first time, as in the authors' code.

    Noise conditions are c_noise as a preconditioner gives it, in every family; ``Family.noise_scale`` is part of the network.
    Parameter names are those of the official EDM networks. Parameters are fp32 and NaN until ``init_weights`` or
    ``load_state_dict``. The torso computes in the dtype of x, the embedding in that of the parameters.
    Raises ValueError for sizes that cannot work.
    """

    def __init__(
        self,
        family: Family | str,
        img_resolution: int,
        img_channels: int,
        *,
        out_channels: int | None = None,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        dropout_max_resolution: int = 0,
        fourier_scale: float | None = None,
        second_time: bool = False,
        second_time_init: Literal["zero", "random"] = "zero",
    ) -> None:
        super().__init__()
        self.family = _family(family)
        self.resolutions = level_resolutions(img_resolution, len(channel_mult))
        if model_channels % 2:
            raise ValueError(f"model_channels is {model_channels}, but the noise embedding needs an even number")
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.out_channels = img_channels if out_channels is None else out_channels
        self.label_dim, self.augment_dim, self.num_blocks = label_dim, augment_dim, num_blocks
        self.attn_resolutions, self.second_time = frozenset(attn_resolutions), second_time
        self.dropout, self.dropout_max_resolution = dropout, dropout_max_resolution or img_resolution
        self.emb_channels = model_channels * channel_mult_emb
        self._second_init = (ZEROS if second_time_init == "zero" else self.family.init.layer) if second_time else None

        self._build_embedding(model_channels * self.family.channel_mult_noise, fourier_scale)
        widths = [model_channels * mult for mult in channel_mult]
        skip_widths = self._build_encoder(widths, widths[0] if self.family.stem_mult else model_channels)
        self._build_decoder(widths, skip_widths)
        self._blocks = [module for module in self.modules() if isinstance(module, Block)]
        for site, block in enumerate(self._blocks):
            block.site = site

    def forward(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C2 H W"]:
        """F(x; c_noise): [N, out_channels, H, W], channels_last, in the dtype of x.

        c_noise_N, second_N: noise conditions as the preconditioner gives them (second_N when and only when the network
        has ``second_time``). labels: one-hot rows [N, label_dim], None for rows of zeros (no class). augment:
        [N, augment_dim], None for images that were not augmented. dropout: key of the masks, None for no dropout.
        Raises ValueError for arguments this network was not built for.
        """
        features_NCHW, image_NCHW = self._features(x_NCHW, c_noise_N, second_N, labels, augment, dropout)
        output_NCHW = self.head(features_NCHW)
        return output_NCHW if image_NCHW is None else output_NCHW + image_NCHW

    def trunk(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        cut: Cut = "head",
    ) -> Float[Tensor, "N E H W"]:
        """What ``tail`` makes the output of: tail(cut)(trunk(..., cut)) is the network. Arguments as in ``forward``."""
        if self.family.decoder == "skip":
            raise ValueError("every level of this network adds to its output (decoder 'skip'), so it has no single last layer")
        if cut == "head":
            return self._features(x_NCHW, c_noise_N, second_N, labels)[0]
        last_NCHW, context, _ = self._before_last_block(x_NCHW, c_noise_N, second_N, labels)
        return torch.cat(self._last_block.first_half(last_NCHW, context), dim=1)

    def tail(self, cut: Cut = "head") -> nn.Module:
        """The last layer, or with cut "block" what follows the input of the last block's conv1, see ``LastBlock``."""
        return self.head if cut == "head" else LastBlock(self._last_block, self._last_norm, self.head)

    @property
    def head(self) -> Conv:
        """The last layer."""
        return self.out_conv if self.family.head == "out" else self.dec[level_name(self.resolutions[0], "aux_conv")]

    def _features(
        self,
        x_NCHW: Tensor,
        c_noise_N: Tensor,
        second_N: Tensor | None,
        labels: Tensor | None,
        augment: Tensor | None = None,
        dropout: PhiloxKey | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The input of the last layer, and what lower levels add to its output, if they do."""
        last_NCHW, context, image_NCHW = self._before_last_block(x_NCHW, c_noise_N, second_N, labels, augment, dropout)
        return self._last_norm(self._last_block(last_NCHW, context), silu=True), image_NCHW

    def _before_last_block(
        self,
        x_NCHW: Tensor,
        c_noise_N: Tensor,
        second_N: Tensor | None,
        labels: Tensor | None,
        augment: Tensor | None = None,
        dropout: PhiloxKey | None = None,
    ) -> tuple[Tensor, Context, Tensor | None]:
        """The input of the last block, what blocks are told, and what lower levels add to the output, if they do."""
        self.check_inputs(x_NCHW, second_N, labels, augment)
        context = Context(self._project(*self.embed(c_noise_N, second_N, labels, augment)), dropout)
        x_NCHW, skips = self._encode(x_NCHW.contiguous(memory_format=torch.channels_last), context)
        last_NCHW, image_NCHW = self._decode(x_NCHW, skips, context)
        return last_NCHW, context, image_NCHW

    def embed(
        self,
        c_noise_N: Float[Tensor, " N"],
        second_N: Float[Tensor, " N"] | None = None,
        labels: Float[Tensor, "N L"] | None = None,
        augment: Float[Tensor, "N A"] | None = None,
    ) -> tuple[Float[Tensor, "N E"], Float[Tensor, "N E"] | None]:
        """What the blocks see of the condition, [N, E], and of the second time (None without one)."""
        label_NE = self._embed_labels(labels, len(c_noise_N), c_noise_N.device)
        before, after = (label_NE, None) if self.family.labels == "before_mlp" else (None, label_NE)
        noise = _plus(self._embed_noise(c_noise_N), before)
        if augment is not None:
            noise = noise + self.map_augment(augment.to(noise.dtype))
        emb_NE = F.silu(_plus(self.map_layer1(F.silu(self.map_layer0(noise))), after))
        if second_N is None:
            return emb_NE, None
        second = _plus(self._embed_noise(second_N), before)
        return emb_NE, F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(second))))

    def _embed_noise(self, c_noise_N: Tensor) -> Tensor:
        return self.map_noise(c_noise_N.to(self.map_layer0.weight.dtype) * self.family.noise_scale)

    def _project(self, emb_NE: Tensor, second_NE: Tensor | None) -> tuple[Tensor, ...]:
        """The affine maps of all blocks, in the order of their sites, as one matrix product instead of dozens of tiny ones."""
        blocks = self._blocks
        affine_NA = linear_of_all(emb_NE, [block.affine.weight for block in blocks], [block.affine_bias for block in blocks])
        if second_NE is not None:
            layers = [block.affine_s for block in blocks]
            affine_NA = affine_NA + linear_of_all(
                second_NE, [layer.weight for layer in layers], [layer.bias for layer in layers]
            )
        return affine_NA.split([len(block.affine.bias) for block in blocks], dim=1)

    def _embed_labels(self, labels: Tensor | None, num: int, device: torch.device) -> Tensor | None:
        """What class labels add before or after the MLP; None in a network without labels."""
        if not self.label_dim:
            return None
        dtype = self.map_label.weight.dtype
        rows = torch.zeros(num, self.label_dim, dtype=dtype, device=device) if labels is None else labels.to(dtype)
        return self.map_label(rows * math.sqrt(self.label_dim) if self.family.labels == "before_mlp" else rows)

    def _encode(self, x_NCHW: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """From full to lowest resolution; the second result is what the decoder reads, in the order of making."""
        image_NCHW = x_NCHW
        x_NCHW = self.enc[level_name(self.resolutions[0], "conv")](x_NCHW)
        skips = [x_NCHW]
        for resolution in self.resolutions:
            if resolution != self.resolutions[0]:
                x_NCHW = self.enc[level_name(resolution, "down")](x_NCHW, context)
                x_NCHW, image_NCHW = self._merge_image(resolution, x_NCHW, image_NCHW)
                skips.append(x_NCHW)
            for index in range(self.num_blocks):
                x_NCHW = self.enc[level_name(resolution, f"block{index}")](x_NCHW, context)
                skips.append(x_NCHW)
        return x_NCHW, skips

    def _merge_image(self, resolution: int, x_NCHW: Tensor, image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the pyramid beside the encoder down to this resolution and add it to the features."""
        if self.family.encoder == "skip":
            image_NCHW = self.enc[level_name(resolution, "aux_down")](image_NCHW)
            return x_NCHW + self.enc[level_name(resolution, "aux_skip")](image_NCHW), image_NCHW
        if self.family.encoder == "residual":
            x_NCHW = (x_NCHW + self.enc[level_name(resolution, "aux_residual")](image_NCHW)).mul_(math.sqrt(0.5))
            return x_NCHW, x_NCHW
        return x_NCHW, image_NCHW

    def _decode(self, x_NCHW: Tensor, skips: list[Tensor], context: Context) -> tuple[Tensor, Tensor | None]:
        """From lowest to full resolution, up to the input of the last block."""
        image_NCHW = None
        for resolution in reversed(self.resolutions):
            entry = ("in0", "in1") if resolution == self.resolutions[-1] else ("up",)
            for kind in entry:
                x_NCHW = self.dec[level_name(resolution, kind)](x_NCHW, context)
            if image_NCHW is not None:
                image_NCHW = self.dec[level_name(resolution, "aux_up")](image_NCHW)
            for index in range(self.num_blocks + 1):
                x_NCHW = torch.cat([x_NCHW, skips.pop()], dim=1)
                block = self.dec[level_name(resolution, f"block{index}")]
                x_NCHW = x_NCHW if block is self._last_block else block(x_NCHW, context)
            if self.family.decoder == "skip" and resolution != self.resolutions[0]:
                image_NCHW = _plus(self._image_of(resolution, x_NCHW), image_NCHW)
        return x_NCHW, image_NCHW

    @property
    def _last_block(self) -> Block:
        return self.dec[level_name(self.resolutions[0], f"block{self.num_blocks}")]

    @property
    def _last_norm(self) -> GroupNorm:
        return self.out_norm if self.family.head == "out" else self.dec[level_name(self.resolutions[0], "aux_norm")]

    def _image_of(self, resolution: int, x_NCHW: Tensor) -> Tensor:
        """What this level contributes to the output."""
        normed_NCHW = self.dec[level_name(resolution, "aux_norm")](x_NCHW, silu=True)
        return self.dec[level_name(resolution, "aux_conv")](normed_NCHW)

    def _build_embedding(self, noise_channels: int, fourier_scale: float | None) -> None:
        family, init, emb_channels = self.family, self.family.init, self.emb_channels
        if family.embedding == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, family.endpoint, family.sin_first, family.frequencies)
        else:
            scale = family.fourier_scale if fourier_scale is None else fourier_scale
            self.map_noise = FourierEmbedding(noise_channels, scale, family.sin_first)
        if self.label_dim:
            width = noise_channels if family.labels == "before_mlp" else emb_channels
            has_bias = family.labels == "before_mlp"
            self.map_label = Linear(self.label_dim, width, family.label_init(self.label_dim), bias=has_bias)
        if self.augment_dim:
            self.map_augment = Linear(self.augment_dim, noise_channels, init.augment, bias=False)
        self.map_layer0 = Linear(noise_channels, emb_channels, init.layer)
        self.map_layer1 = Linear(emb_channels, emb_channels, init.layer)
        if self.second_time:
            self.map_layer0_s = Linear(noise_channels, emb_channels, init.layer)
            self.map_layer1_s = Linear(emb_channels, emb_channels, init.layer)

    def _build_encoder(self, widths: list[int], stem_width: int) -> list[int]:
        """Fill ``enc`` and return the widths of what the decoder reads, in the order of making."""
        self.enc = nn.ModuleDict()
        self.enc[level_name(self.resolutions[0], "conv")] = Conv(self.img_channels, stem_width, 3, self.family.init.layer)
        image_width, skip_widths = self.img_channels, [stem_width]
        for resolution, width in zip(self.resolutions, widths, strict=True):
            before = skip_widths[-1]
            if resolution != self.resolutions[0]:
                self.enc[level_name(resolution, "down")] = self._resampler(resolution, before, "down")
                image_width = self._build_merge(resolution, image_width, before)
                skip_widths.append(before)
            heads = self.family.heads(width) if resolution in self.attn_resolutions else 0
            for index in range(self.num_blocks):
                self.enc[level_name(resolution, f"block{index}")] = self._block(resolution, skip_widths[-1], width, heads)
                skip_widths.append(width)
        return skip_widths

    def _build_merge(self, resolution: int, image_width: int, width: int) -> int:
        """The layers of ``_merge_image`` for one level; returns the width of the pyramid after it."""
        init, down = self.family.init.layer, Resample(self.family.resample_filter, up=False)
        if self.family.encoder == "skip":
            self.enc[level_name(resolution, "aux_down")] = down
            self.enc[level_name(resolution, "aux_skip")] = Conv(image_width, width, 1, init)
        if self.family.encoder == "residual":
            self.enc[level_name(resolution, "aux_residual")] = ConvThenDown(image_width, width, 3, init, down)
            return width
        return image_width

    def _build_decoder(self, widths: list[int], skip_widths: list[int]) -> None:
        """Fill ``dec`` and, where the family has one, the output head after it."""
        self.dec = nn.ModuleDict()
        before = skip_widths[-1]
        for resolution, width in reversed(list(zip(self.resolutions, widths, strict=True))):
            if resolution == self.resolutions[-1]:
                self.dec[level_name(resolution, "in0")] = self._block(resolution, before, before, self.family.heads(before))
                self.dec[level_name(resolution, "in1")] = self._block(resolution, before, before)
            else:
                self.dec[level_name(resolution, "up")] = self._resampler(resolution, before, "up")
            for index in range(self.num_blocks + 1):
                attends = self.family.decoder_attention == "all" or index == self.num_blocks
                heads = self.family.heads(width, decoder=True) if attends and resolution in self.attn_resolutions else 0
                block = self._block(resolution, before + skip_widths.pop(), width, heads)
                self.dec[level_name(resolution, f"block{index}")] = block
                before = width
            self._build_image_head(resolution, width)

    def _build_image_head(self, resolution: int, width: int) -> None:
        """The layers of ``_add_image`` for one level, or those of the output after the last one."""
        family = self.family
        norm = GroupNorm(width, family.eps, family.min_group_channels)
        conv = Conv(width, self.out_channels, 3, family.init.output)
        is_last = resolution == self.resolutions[0]
        if self.family.head == "out":
            if is_last:
                self.out_norm, self.out_conv = norm, conv
            return
        if is_last or self.family.decoder == "skip":
            self.dec[level_name(resolution, "aux_norm")], self.dec[level_name(resolution, "aux_conv")] = norm, conv
        if self.family.decoder == "skip" and resolution != self.resolutions[-1]:
            self.dec[level_name(resolution, "aux_up")] = Resample(self.family.resample_filter, up=True)

    def _block(
        self,
        resolution: int,
        in_channels: int,
        out_channels: int,
        num_heads: int = 0,
        resample: Literal["up", "down"] | None = None,
    ) -> Block:
        return Block(
            in_channels,
            out_channels,
            self.emb_channels,
            self.family,
            dropout=self.dropout if resolution <= self.dropout_max_resolution else 0.0,
            resample=resample,
            num_heads=num_heads,
            second_init=self._second_init,
        )

    def _resampler(self, resolution: int, channels: int, direction: Literal["up", "down"]) -> nn.Module:
        """The layer that brings the features to this resolution."""
        if self.family.resample_layers == "block":
            return self._block(resolution, channels, channels, resample=direction)
        init = self.family.init.layer
        return (
            PlainDown(channels, channels, 3, init)
            if direction == "down"
            else PlainUp(channels, channels, 3, init, Resample(NEAREST, up=True))
        )


def _plus(x: Tensor, term: Tensor | None) -> Tensor:
    return x if term is None else x + term


def _family(family: Family | str) -> Family:
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        raise ValueError(f"there is no network family {family!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family]
