"""The whole configuration of a job, and the way to it from plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config.model import CELL, PRESETS, VAE_SPATIAL, ModelDims
from engine.config.rules import validate
from engine.config.sections import (
    CommConfig,
    DrillConfig,
    GeometryConfig,
    LivenessConfig,
    LogConfig,
    ModelConfig,
    PipelineConfig,
    PlanConfig,
    RunConfig,
    ScheduleConfig,
    SinkConfig,
    SourceConfig,
    TripwireConfig,
)
from engine.config.values import convert, parse_text, unknown
from engine.errors import ConfigError
from engine.plan import PP_PLANS, canonical_plan, steps_within


@dataclass(frozen=True)
class EngineConfig:
    """The whole configuration of a job. Every rank gets the same file; `parity_key` proves it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    tripwires: TripwireConfig = field(default_factory=TripwireConfig)
    run: RunConfig = field(default_factory=RunConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    sink: SinkConfig = field(default_factory=SinkConfig)
    log: LogConfig = field(default_factory=LogConfig)
    drill: DrillConfig = field(default_factory=DrillConfig)

    @property
    def dims(self) -> ModelDims:
        return PRESETS[self.model.preset]

    @property
    def latent_hw(self) -> tuple[int, int]:
        return self.geometry.height // VAE_SPATIAL, self.geometry.width // VAE_SPATIAL

    @property
    def tokens_per_frame(self) -> int:
        return (self.geometry.height // CELL) * (self.geometry.width // CELL)

    @property
    def world_size(self) -> int:
        return self.plan.tp + int(self.plan.tp_plan in PP_PLANS)

    @property
    def regime(self) -> str:
        """The recompute regime of the contract: R1 off, R0a from pixels, R0 from latents (another result)."""
        if not self.schedule.recompute:
            return "R1"
        return "R0a" if self.schedule.anchor == "reencode" else "R0"

    @property
    def noise_scale(self) -> float | None:
        """Of video-to-video; None where there is no source video."""
        return self.source.noise_scale if self.source.video else None

    @property
    def steps(self) -> tuple[int, ...]:
        """The denoise steps of every chunk: of video-to-video those that begin no noisier than its latents are."""
        return steps_within(self.schedule.denoising_step_list, self.noise_scale)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain data, ready for TOML or JSON."""
        return {
            section.name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(getattr(self, section.name)).items()
            }
            for section in dataclasses.fields(self)
        }

    def parity_key(self) -> str:
        """sha256 over every value: equal on every rank, or start-up fails."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def replace(self, **dotted: Any) -> EngineConfig:
        """A validated copy with `section__key=value` changed."""
        data = self.to_dict()
        for name, value in dotted.items():
            section, key = name.split("__")
            data[section][key] = value
        return from_dict(data)

    def of_rank(self, rank: int) -> EngineConfig:
        """What this rank will hold: the victim of a drill that *is* a difference gets `drill.differs` on top.

        Raises:
            ConfigError: a malformed `differs`.
        """
        if not self.drill.differs or rank != self.drill.victim_rank:
            return self
        dotted, equals, text = self.drill.differs.partition("=")
        if not equals:
            raise ConfigError("drill.differs must be section.key=value", code="TP-1013")
        known = dotted_keys()
        if dotted not in known:
            raise ConfigError(f"drill.differs names no key: '{dotted}'", code="TP-1013")
        return self.replace(**{dotted.replace(".", "__"): parse_text(text, known[dotted], dotted, "drill.differs")})


SECTIONS: dict[str, type] = {
    f.name: typing.get_type_hints(EngineConfig)[f.name] for f in dataclasses.fields(EngineConfig)
}


def dotted_keys() -> dict[str, Any]:
    """Every `section.key` with its type."""
    return {
        f"{section}.{f.name}": typing.get_type_hints(cls)[f.name]
        for section, cls in SECTIONS.items()
        for f in dataclasses.fields(cls)
    }


def from_dict(data: Mapping[str, Any], where: str = "configuration") -> EngineConfig:
    """Parse nested plain data and validate it.

    Raises:
        ConfigError: an unknown section or key (with the nearest name), a wrong type or choice.
        GeometryError: sizes that cannot be served.
    """
    sections = {}
    for name, values in data.items():
        if name not in SECTIONS:
            raise unknown(name, SECTIONS, where)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: [{name}] must be a table", code="TP-1003", where=where)
        hints = typing.get_type_hints(SECTIONS[name])
        parsed = {}
        for key, value in values.items():
            if key not in hints:
                raise unknown(f"{name}.{key}", [f"{name}.{k}" for k in hints], where)
            parsed[key] = convert(value, hints[key], f"{name}.{key}", where)
        sections[name] = SECTIONS[name](**parsed)
    config = EngineConfig(**sections)
    config = dataclasses.replace(
        config, plan=dataclasses.replace(config.plan, tp_plan=canonical_plan(config.plan.tp_plan))
    )
    validate(config)
    return config
