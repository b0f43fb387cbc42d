"""Samplers in k-diffusion's convention, and ``sample``, which makes images from a model and a seed."""

from fastcm.sampling.ablation import Ablation, sample_ablation
from fastcm.sampling.consistency import consistency_sigmas, sample_consistency
from fastcm.sampling.edm import sample_euler, sample_heun
from fastcm.sampling.generate import sample
from fastcm.sampling.guidance import Guided

__all__ = [
    "Ablation",
    "Guided",
    "consistency_sigmas",
    "sample",
    "sample_ablation",
    "sample_consistency",
    "sample_euler",
    "sample_heun",
]
