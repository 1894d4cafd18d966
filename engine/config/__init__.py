"""Frozen configuration: its sections, the rules between them, and where each value comes from."""

from engine.config.files import Loaded, load, read_toml
from engine.config.job import EngineConfig, dotted_keys, from_dict
from engine.config.launcher import RankEnv
from engine.config.model import PATCH, PRESETS, VAE_SPATIAL, VAE_TEMPORAL, ModelDims, valid_degrees
from engine.config.rules import CHOICES, SINK_KINDS
from engine.config.sections import (
    DrillConfig,
    GeometryConfig,
    LivenessConfig,
    PipelineConfig,
    SinkConfig,
    SourceConfig,
)
from engine.config.values import parse_text

__all__ = [
    "CHOICES",
    "PATCH",
    "PRESETS",
    "SINK_KINDS",
    "VAE_SPATIAL",
    "VAE_TEMPORAL",
    "DrillConfig",
    "EngineConfig",
    "GeometryConfig",
    "LivenessConfig",
    "Loaded",
    "ModelDims",
    "PipelineConfig",
    "RankEnv",
    "SinkConfig",
    "SourceConfig",
    "dotted_keys",
    "from_dict",
    "load",
    "parse_text",
    "read_toml",
    "valid_degrees",
]
