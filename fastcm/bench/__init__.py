"""Benchmarks of the kernels on the shapes that the networks have."""
