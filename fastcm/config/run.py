"""The sections of a whole run: data, phases with their optimizer and averages, where to compute, what to write down."""

import hashlib
import json
import re
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from fastcm.config.features import FeaturesConfig
from fastcm.config.network import NetworkConfig, UNetConfig
from fastcm.config.objective import ObjectiveConfig, PDObjectiveConfig
from fastcm.config.optimizer import OptimizerConfig
from fastcm.config.section import Fraction, Positive, Section


class DataConfig(Section):
    """Which images to train on."""

    kind: Literal["digits", "cifar10", "edm_zip", "folder", "npz"] = "digits"
    path: str = ""  # archive or folder; empty for digits
    resolution: Annotated[int, Field(ge=0)] = 0  # expected side in pixels; 0 accepts what the set has
    conditional: bool = False  # train a class-conditional network on the set's labels
    xflip: bool = False  # mirror each image with probability 1/2
    download: bool = False  # fetch CIFAR-10 into ``path`` if it is not there

    @model_validator(mode="after")
    def _check_path(self) -> "DataConfig":
        if self.kind == "digits" and self.path:
            raise ValueError(f"path is '{self.path}', but the digits come with the package: set kind to what lies there")
        return self


class EMAConfig(Section):
    """Weight averaging: fixed half-life (EDM) or power function of the images seen (EDM2, arXiv 2312.02696)."""

    kind: Literal["halflife", "power"] = "halflife"
    halflife_images: Annotated[float, Field(gt=0)] = 500_000.0
    rampup_ratio: Annotated[float, Field(ge=0)] = 0.0  # half-life <= ratio * images seen; 0 = no ramp-up
    std: Annotated[float, Field(gt=0, lt=0.28)] = 0.05  # power function: relative width of the averaged interval


class PhaseConfig(Section):
    """One objective trained for a while; phases run in the order they are written in."""

    objective: ObjectiveConfig
    init: str = "previous"  # "previous" (phase; fresh weights in the first one), "fresh", or the path of a bundle
    teacher: str = ""  # path of the bundle that an objective distils; empty = the model that the weights begin from
    duration_images: Positive
    batch_size: Positive = 128
    microbatch_size: Annotated[int, Field(ge=0)] = 0  # gradient accumulation; 0 = the whole batch at once
    dropout: Fraction = 0.0
    dropout_max_resolution: Annotated[int, Field(ge=0)] = 0  # drop out only at resolutions up to this; 0 = at all of them
    augment: Fraction = 0.0  # strength p of EDM's augmentation pipe; 0 = off
    optimizer: OptimizerConfig = OptimizerConfig()
    emas: dict[str, EMAConfig] = Field({"main": EMAConfig()}, min_length=1)  # the first one is sampled from
    ema_snapshot_images: Annotated[int, Field(ge=0)] = 0  # keep the power EMAs this often, for ``fastcm ema``; 0 = never

    @model_validator(mode="after")
    def _check(self) -> "PhaseConfig":
        if self.microbatch_size and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size {self.microbatch_size} does not divide batch_size {self.batch_size}")
        for name in self.emas:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"EMA name '{name}' may hold letters, digits and underscores only")
        if isinstance(self.objective, PDObjectiveConfig):
            self._check_stages(self.objective.stage_images)
        if self.ema_snapshot_images and isinstance(self.objective, PDObjectiveConfig):
            raise ValueError(
                "ema_snapshot_images: progressive distillation begins its averages anew at each stage; leave it out"
            )
        if self.ema_snapshot_images and not any(ema.kind == "power" for ema in self.emas.values()):
            raise ValueError(f"ema_snapshot_images is {self.ema_snapshot_images}, but no EMA in emas is of kind 'power'")
        return self

    def _check_stages(self, stage_images: int) -> None:
        if stage_images < self.batch_size:
            raise ValueError(
                f"objective.stage_images {stage_images} is below batch_size {self.batch_size}: stages would be left out"
            )
        needed = self.optimizer.warmup_images + self.optimizer.cooldown_images
        if needed > stage_images:
            raise ValueError(
                f"optimizer: warmup_images and cooldown_images, {needed} in all, begin anew in each stage and do not fit into "
                f"objective.stage_images {stage_images}"
            )


class ComputeConfig(Section):
    """Where and in which precision to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the network's torso; everything else stays fp32
    tf32: bool = False  # TensorFloat-32 for fp32 convolutions and matrix products on CUDA
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on CUDA only
    cuda_graph: Literal["auto", "on", "off"] = "auto"  # replay the whole step as one CUDA graph; auto = on CUDA
    backend: Literal["auto", "torch", "triton", "xformers", "apex"] = "auto"  # of the kernels; auto = the fastest that runs
    strict: bool = False  # a kernel that cannot run is an error instead of a warning and its PyTorch reference
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads; 0 = torch's choice; 1 gives the same bits on any number of cores

    @field_validator("compile", "cuda_graph", mode="before")
    @classmethod
    def _read_yaml_words(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value  # YAML 1.1 reads on as true


class TelemetryConfig(Section):
    """What is written down, and how often."""

    log_images: Positive = 10_000  # one line of metrics.jsonl
    snapshot_images: Positive = 1_000_000  # checkpoint, bundle and picture grids; a kill loses at most this much
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    grid_size: Annotated[int, Field(gt=0, le=32)] = 8  # pictures per side of a grid
    heun_steps: Annotated[int, Field(ge=2, le=1000)] = 18  # steps of the pretraining grids: 2 steps - 1 network evaluations
    evaluate: bool = False  # Frechet distances at the end of the run (digits only)


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig = DataConfig()
    network: NetworkConfig = UNetConfig()
    phases: Annotated[dict[str, PhaseConfig], Field(min_length=1)]
    compute: ComputeConfig = ComputeConfig()
    features: FeaturesConfig = FeaturesConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.telemetry.evaluate and self.data.kind != "digits":
            raise ValueError("telemetry.evaluate needs data.kind 'digits', the only set with a built-in feature network")
        for name, phase in self.phases.items():
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"phase name '{name}' may hold letters, digits and underscores only")
            if getattr(phase.objective, "uncertainty", False) and not getattr(self.network, "logvar_channels", 0):
                raise ValueError(f"phases.{name}.objective.uncertainty needs network.family edm2 with logvar_channels above 0")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that loads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with any value of the configuration."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
