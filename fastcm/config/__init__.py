"""Typed configuration: frozen sections, strict YAML, one optional ``base:``, dotted overrides, a stable hash.

Every duration, interval and half-life counts images, so a change of batch size changes no schedule.
"""

from fastcm.config.features import FeaturesConfig
from fastcm.config.files import load_config, parse_config, shipped_configs
from fastcm.config.network import BundleNetworkConfig, EDM2Config, FamilyOverrides, NetworkConfig, UNetConfig
from fastcm.config.objective import (
    CDObjectiveConfig,
    CTMObjectiveConfig,
    CTObjectiveConfig,
    DiscreteObjectiveConfig,
    ECTObjectiveConfig,
    EDMObjectiveConfig,
    GANConfig,
    ICTObjectiveConfig,
    ObjectiveConfig,
    PDObjectiveConfig,
)
from fastcm.config.optimizer import OptimizerConfig
from fastcm.config.run import ComputeConfig, Config, DataConfig, EMAConfig, PhaseConfig, TelemetryConfig

__all__ = [
    "BundleNetworkConfig",
    "CDObjectiveConfig",
    "CTMObjectiveConfig",
    "CTObjectiveConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DiscreteObjectiveConfig",
    "ECTObjectiveConfig",
    "EDM2Config",
    "EDMObjectiveConfig",
    "EMAConfig",
    "FamilyOverrides",
    "FeaturesConfig",
    "GANConfig",
    "ICTObjectiveConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PDObjectiveConfig",
    "PhaseConfig",
    "TelemetryConfig",
    "UNetConfig",
    "load_config",
    "parse_config",
    "shipped_configs",
]
