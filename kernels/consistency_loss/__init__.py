"""Distance between a denoiser's output and its stop-gradient target, from raw network outputs to one loss per sample."""

from .reference import DISTANCES, consistency_loss

__all__ = ["DISTANCES", "consistency_loss"]
