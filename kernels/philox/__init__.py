"""Philox4x32-10 counter-based random numbers."""

from .reference import PhiloxKey, philox4x32, random_bits, random_dropout, random_normal

__all__ = ["PhiloxKey", "philox4x32", "random_bits", "random_dropout", "random_normal"]
