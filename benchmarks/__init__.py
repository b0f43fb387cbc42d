"""Benchmarks: fair, named baselines and the commands that repeat every number in the documentation."""
