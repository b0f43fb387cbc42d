"""Networks: the U-Net family of EDM and the U-Net of EDM2, their blocks, layers and embeddings."""

from fastcm.nn.edm2 import EDM2UNet
from fastcm.nn.families import FAMILIES, Family
from fastcm.nn.network import Network
from fastcm.nn.unet import UNet

__all__ = ["FAMILIES", "EDM2UNet", "Family", "Network", "UNet"]
