"""Distance between a denoiser's output and its stop-gradient target, from raw network outputs to one loss per sample."""

from .reference import DISTANCES
from .reference import consistency_loss as consistency_loss_reference
from .registration import consistency_loss, consistency_loss_jvp

__all__ = ["DISTANCES", "consistency_loss", "consistency_loss_jvp", "consistency_loss_reference"]
