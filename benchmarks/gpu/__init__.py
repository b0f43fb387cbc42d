"""What ``benchmarks.gpu_report`` is made of: its parts, how large they are, the goals, the tables."""
