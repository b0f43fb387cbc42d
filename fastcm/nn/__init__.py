"""Networks: the U-Net family of EDM, its blocks, layers and embeddings."""

from fastcm.nn.families import FAMILIES, Family
from fastcm.nn.unet import UNet

__all__ = ["FAMILIES", "Family", "UNet"]
