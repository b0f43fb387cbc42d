"""From the network section of a configuration to a U-Net."""

from fastcm.config import NetworkConfig
from fastcm.errors import ConfigError
from fastcm.nn.unet import UNet


def build_network(
    config: NetworkConfig, image_shape: tuple[int, int, int], label_dim: int = 0, augment_dim: int = 0, dropout: float = 0.0
) -> UNet:
    """A U-Net for images of shape (C, H, W) with uninitialised weights; call ``init_weights(seed)`` or load some.

    Raises ConfigError for a network that these images cannot pass through.
    """
    channels, height, _ = image_shape
    try:
        return _unet(config, height, channels, label_dim, augment_dim, dropout)
    except ValueError as error:
        raise ConfigError(f"network: {error}") from None


def _unet(config: NetworkConfig, resolution: int, channels: int, label_dim: int, augment_dim: int, dropout: float) -> UNet:
    return UNet(
        config.family,
        resolution,
        channels,
        label_dim=label_dim,
        augment_dim=augment_dim,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        channel_mult_emb=config.channel_mult_emb,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=dropout,
        fourier_scale=config.fourier_scale,
        second_time=config.second_time,
    )
