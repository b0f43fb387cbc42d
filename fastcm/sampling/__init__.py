"""Samplers in k-diffusion's convention, and ``sample``, which makes images from a model and a seed."""

from fastcm.sampling.ablation import Ablation, sample_ablation
from fastcm.sampling.accelerate import AcceleratedModel, accelerate
from fastcm.sampling.ancestral import sample_ancestral
from fastcm.sampling.classifier import Classifier, ClassifierGuided, sample_with_rejection
from fastcm.sampling.consistency import consistency_sigmas, sample_consistency
from fastcm.sampling.dpm import sample_dpm
from fastcm.sampling.edm import sample_euler, sample_heun
from fastcm.sampling.generate import sample
from fastcm.sampling.guidance import Guided
from fastcm.sampling.likelihood import Likelihood, bits_per_dim
from fastcm.sampling.trajectory import sample_trajectory

__all__ = [
    "Ablation",
    "AcceleratedModel",
    "Classifier",
    "ClassifierGuided",
    "Guided",
    "Likelihood",
    "accelerate",
    "bits_per_dim",
    "consistency_sigmas",
    "sample",
    "sample_ablation",
    "sample_ancestral",
    "sample_consistency",
    "sample_dpm",
    "sample_euler",
    "sample_heun",
    "sample_trajectory",
    "sample_with_rejection",
]
