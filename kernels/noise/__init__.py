"""Noised images and scaled network inputs in one pass, with the noise drawn on the fly."""

from .reference import NoisedInputs
from .reference import add_noise as add_noise_reference
from .registration import add_noise

__all__ = ["NoisedInputs", "add_noise", "add_noise_reference"]
