"""Every rule between the values of a configuration."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing

from engine.config.model import CELL, PRESETS, ModelDims, valid_degrees
from engine.config.sections import DrillConfig, SinkConfig
from engine.errors import ConfigError, GeometryError
from engine.plan import ALIASES, PLANS, PP0, TIMESTEPS

if typing.TYPE_CHECKING:
    from engine.config.job import EngineConfig


CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": tuple(PRESETS),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attention_backend": ("auto", "sdpa", "flex"),
    "model.compile": ("off", "inductor", "aot_eager", "eager"),
    "schedule.anchor": ("reencode", "latent"),
    "comm.backend": ("auto", "gloo", "nccl"),
    "plan.tp_plan": PLANS,
    "pipeline.cut": ("discard", "finish"),
    "log.level": ("debug", "info", "warning", "error"),
    "source.on_end": ("stop", "loop", "hold"),
    "sink.on_slow": ("block", "drop-oldest", "fail"),
    "sink.no_reader": ("discard", "wait", "fail"),
}
LEAST_LOG_BYTES = 16 << 10  # room for the longest line, and for more than one of them
SINK_KINDS = ("mp4", "sheet", "raw", "segments", "preview", "pipe", "null")


def validate(config: EngineConfig) -> None:
    """Every rule between values. Raises ConfigError or GeometryError with the rule and the way out."""
    _check_choices(config)
    _check_geometry(config)
    _check_division(config.dims, config.plan.tp)
    steps = config.schedule.denoising_step_list
    if not steps or any(not 0 < s <= 1000 for s in steps) or list(steps) != sorted(set(steps), reverse=True):
        raise ConfigError(
            f"schedule.denoising_step_list must fall from at most 1000 to above 0, is {list(steps)}",
            code="TP-1010",
        )
    if not 0 < config.schedule.kv_cache_attention_bias <= 1:
        raise ConfigError(
            f"schedule.kv_cache_attention_bias must be in (0, 1], is {config.schedule.kv_cache_attention_bias}",
            code="TP-1010",
        )
    if config.schedule.shift <= 0:
        raise ConfigError(f"schedule.shift must be above 0, is {config.schedule.shift}", code="TP-1010")
    if config.run.chunks < 0:
        raise ConfigError(f"run.chunks must be 0 (until drained) or more, is {config.run.chunks}", code="TP-1010")
    if config.run.chunks == 0 and config.run.record_latents:
        raise ConfigError(
            "run.record_latents keeps the whole run in memory: it needs an end, but run.chunks is 0 (until drained)",
            code="TP-1010",
            next_step="tpctl config check --set run.record_latents=false",
        )
    _check_sink(config.sink)
    _check_source(config)
    _check_pipeline(config)
    live = config.liveness
    if live.watchdog_s < 3 * live.heartbeat_s:
        raise ConfigError(
            f"liveness.watchdog_s ({live.watchdog_s}) must be at least 3 heartbeats (3 x {live.heartbeat_s})",
            code="TP-1011",
        )
    for name, value in dataclasses.asdict(live).items():
        if value <= 0:
            raise ConfigError(f"liveness.{name} must be above 0, is {value}", code="TP-1011")
    for name, value in dataclasses.asdict(config.tripwires).items():
        if value < 0:
            raise ConfigError(f"tripwires.{name} must be 0 (off) or more, is {value}", code="TP-1011")
    for name, value in dataclasses.asdict(config.comm).items():
        if name != "backend" and value <= 0:
            raise ConfigError(f"comm.{name} must be above 0, is {value}", code="TP-1011")
    if config.log.max_bytes < LEAST_LOG_BYTES or config.log.keep < 0:
        raise ConfigError(
            f"log.max_bytes must be at least {LEAST_LOG_BYTES} and log.keep 0 or more, "
            f"are {config.log.max_bytes} and {config.log.keep}",
            code="TP-1015",
        )
    drill = config.drill
    if not drill.id and drill != DrillConfig():
        raise ConfigError("drill.* says how to break a job, but drill.id names no drill", code="TP-1013")
    if not 0 <= drill.victim_rank < config.world_size or drill.at_chunk < 0:
        raise ConfigError(
            f"drill.victim_rank must be a rank of {config.world_size} and drill.at_chunk at least 0, "
            f"are {drill.victim_rank} and {drill.at_chunk}",
            code="TP-1013",
        )


def _check_choices(config: EngineConfig) -> None:
    for dotted, choices in CHOICES.items():
        section, key = dotted.split(".")
        value = getattr(getattr(config, section), key)
        if value not in choices:
            hint = difflib.get_close_matches(value, [*choices, *ALIASES], n=1)
            raise ConfigError(
                f"{dotted} is {value!r}"
                + (f"; did you mean '{hint[0]}'?" if hint else "")
                + f" It must be one of: {', '.join(choices)}",
                code="TP-1007",
                evidence={"key": dotted, "value": value},
            )
    for kind in config.sink.kinds:
        if kind not in SINK_KINDS:
            raise ConfigError(f"sink.kinds has {kind!r}; known: {', '.join(SINK_KINDS)}", code="TP-1007")


def _check_sink(sink: SinkConfig) -> None:
    for name in ("fps", "queue_chunks"):
        if getattr(sink, name) < 1:
            raise ConfigError(f"sink.{name} must be at least 1, is {getattr(sink, name)}", code="TP-1010")
    for name in ("segment_s", "keep_segments"):
        if not 0 <= getattr(sink, name) < math.inf:
            raise ConfigError(f"sink.{name} must be 0 or more, is {getattr(sink, name)}", code="TP-1010")


def _check_source(config: EngineConfig) -> None:
    source = config.source
    if not 0 < source.noise_scale <= 1:
        raise ConfigError(f"source.noise_scale must be in (0, 1], is {source.noise_scale}", code="TP-5150")
    if source.video and not config.steps:
        least = min(config.schedule.denoising_step_list)
        raise ConfigError(
            f"source.noise_scale is {source.noise_scale}, but the least noisy step of schedule.denoising_step_list is "
            f"{least}: no step begins there or below",
            code="TP-5150",
            next_step=f"tpctl config check --set source.noise_scale={least / TIMESTEPS:g}",
        )


def _check_pipeline(config: EngineConfig) -> None:
    for name in ("d_in", "d_out", "join_timeout_s"):
        value = getattr(config.pipeline, name)
        least = 0 if name == "join_timeout_s" else 1
        if value < least or value == 0:
            raise ConfigError(
                f"pipeline.{name} must be {'at least 1' if least else 'above 0'}, is {value}", code="TP-1014"
            )
    if config.plan.tp_plan == PP0 and config.plan.tp != 1:
        raise ConfigError(
            f"plan pp0 has a mesh of one rank, but plan.tp is {config.plan.tp}",
            code="TP-1014",
            next_step="tpctl config check --set plan.tp_plan=pp1",
        )


def _check_geometry(config: EngineConfig) -> None:
    g = config.geometry
    for name in ("height", "width"):
        value = getattr(g, name)
        if value < CELL or value % CELL:
            near = max(CELL, round(value / CELL) * CELL)
            raise GeometryError(
                f"geometry.{name} must be a multiple of {CELL}, is {value}; the nearest is {near}",
                next_step=f"tpctl config check --set geometry.{name}={near}",
            )
    if g.frames_per_chunk < 1 or g.context_frames < 1:
        raise GeometryError("geometry.frames_per_chunk and geometry.context_frames must be at least 1")
    if g.sink_frames < 0:
        raise GeometryError(f"geometry.sink_frames must be 0 or more, is {g.sink_frames}")
    needed = g.frames_per_chunk + max(g.context_frames if config.schedule.recompute else 0, g.sink_frames)
    if g.window_frames < needed:
        raise GeometryError(
            f"geometry.window_frames is {g.window_frames}, but a chunk of {g.frames_per_chunk} frames with its "
            f"context or sink needs at least {needed}",
            code="TP-1102",
            next_step=f"tpctl config check --set geometry.window_frames={needed}",
        )


def _check_division(dims: ModelDims, tp: int) -> None:
    degrees = valid_degrees(dims)
    if tp not in degrees:
        raise GeometryError(
            f"tp={tp} does not divide the model: {dims.num_heads} heads, FFN width {dims.ffn_dim}. "
            f"Valid degrees: {', '.join(map(str, degrees))}",
            code="TP-1103",
            evidence={"tp": tp, "num_heads": dims.num_heads, "ffn_dim": dims.ffn_dim, "valid": degrees},
            next_step=f"tpctl config check --set plan.tp={max(n for n in degrees if n <= max(tp, 1))}",
        )
