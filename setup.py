"""Metadata and the explicit package map: ``kernels/`` installs as ``fastcm.kernels``, ``configs/`` as ``fastcm.configs``."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGES = (
    ["fastcm", *(f"fastcm.{name}" for name in find_packages("fastcm"))]
    + ["fastcm.kernels", *(f"fastcm.kernels.{name}" for name in find_packages("kernels"))]
    + ["fastcm.configs"]
)
DEPENDENCIES = [
    "torch>=2.10,<2.15",
    "numpy>=1.26",
    "safetensors>=0.4.5",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "click>=8.1",
    "tqdm>=4.66",
    "jaxtyping>=0.2.36",
    "pillow>=10.1",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "scikit-learn>=1.4",
]
HUB_DEPENDENCIES = ["huggingface_hub>=1.32"]
DIFFUSERS_DEPENDENCIES = ["diffusers>=0.42"]
FEATURES_DEPENDENCIES = ["timm>=1.0.31", "torchvision>=0.25", "torchmetrics>=1.9"]
LIKELIHOOD_DEPENDENCIES = ["torchdiffeq>=0.2.5"]
DEV_DEPENDENCIES = [
    *HUB_DEPENDENCIES,
    *DIFFUSERS_DEPENDENCIES,
    *FEATURES_DEPENDENCIES,
    *LIKELIHOOD_DEPENDENCIES,
    "pytest>=8",
    "pytest-xdist>=3.5",
    "pytest-benchmark>=4",
    "beartype>=0.18",
    "ruff>=0.6",
    "build>=1.2",
    "setuptools>=77",
]

setup(
    name="fastcm",
    version="0.1.0",
    description="Train and sample few-step image generators, fast: Easy Consistency Tuning and Consistency Trajectory Models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir={"fastcm": "fastcm", "fastcm.kernels": "kernels", "fastcm.configs": "configs"},
    package_data={"fastcm.configs": ["*.yaml"], "fastcm.train": ["*.html"], "fastcm.kernels": ["*/pinned/*.json"]},
    install_requires=DEPENDENCIES,
    extras_require={
        "dev": DEV_DEPENDENCIES,
        "hub": HUB_DEPENDENCIES,
        "diffusers": DIFFUSERS_DEPENDENCIES,
        "features": FEATURES_DEPENDENCIES,
        "likelihood": LIKELIHOOD_DEPENDENCIES,
    },
    entry_points={"console_scripts": ["fastcm = fastcm.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
