"""Whole training steps to compare with: PyTorch as a textbook writes it, the same compiled, other projects' code."""
