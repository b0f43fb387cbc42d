"""From the network section of a configuration to a network."""

from dataclasses import replace

from fastcm.config import EDM2Config, NetworkConfig, UNetConfig
from fastcm.errors import ConfigError
from fastcm.nn.edm2 import EDM2UNet
from fastcm.nn.families import FAMILIES
from fastcm.nn.network import Network
from fastcm.nn.unet import UNet


def build_network(
    config: NetworkConfig,
    image_shape: tuple[int, int, int],
    label_dim: int = 0,
    augment_dim: int = 0,
    dropout: float = 0.0,
    dropout_max_resolution: int = 0,
) -> Network:
    """A network for images of shape (C, H, W) with uninitialised weights; call ``init_weights(seed)`` or load some.

    dropout: probability at the one site of each block whose resolution is at most dropout_max_resolution (0: of all).
    Raises ConfigError for a network that these images cannot pass through.
    """
    channels, height, width = image_shape
    dropouts = {"dropout": dropout, "dropout_max_resolution": dropout_max_resolution}
    try:
        if height != width:
            raise ValueError(f"images of {height}x{width} pixels: all networks take square ones")
        if isinstance(config, EDM2Config):
            return _edm2(config, height, channels, label_dim, augment_dim, **dropouts)
        return _unet(config, height, channels, label_dim=label_dim, augment_dim=augment_dim, **dropouts)
    except ValueError as error:
        raise ConfigError(f"network: {error}") from None


def _unet(config: UNetConfig, resolution: int, channels: int, **options: float) -> UNet:
    if config.out_channels and config.out_channels < channels:
        raise ValueError(f"out_channels is {config.out_channels}, but the images have {channels} channels; leave it out")
    return UNet(
        replace(FAMILIES[config.family], **config.overrides.given()),
        resolution,
        channels,
        out_channels=config.out_channels or channels,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        channel_mult_emb=config.channel_mult_emb,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        fourier_scale=config.fourier_scale,
        second_time=config.second_time,
        second_time_init=config.second_time_init,
        **options,
    )


def _edm2(config: EDM2Config, resolution: int, channels: int, label_dim: int, augment_dim: int, **dropouts: float) -> EDM2UNet:
    if augment_dim:
        raise ValueError("family edm2 takes no augmentation labels; set augment: 0 in every phase")
    sizes = config.model_dump(exclude={"family"})
    return EDM2UNet(resolution, channels, label_dim=label_dim, **sizes, **dropouts)
