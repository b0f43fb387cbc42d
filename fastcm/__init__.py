"""fastcm: train and sample few-step image generators, fast."""

__version__ = "0.1.0"
