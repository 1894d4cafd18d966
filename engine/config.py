"""Frozen configuration, and the only code that reads TOML or the environment.

A value comes from a flag, else the environment (`TPCTL_SECTION_KEY`), else the project file, else the user file, else
the default written here. `load` returns the configuration and the origin of each value. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, GeometryError
from engine.plan import ALIASES, PLANS, PP0, PP_PLANS, canonical_plan

VAE_SPATIAL = 8
VAE_TEMPORAL = 4
PATCH = 2
CELL = VAE_SPATIAL * PATCH  # pixels on a side of one token


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a Wan2.1 text-to-video transformer. `dim` is the model width; patches are (1, 2, 2)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int = 512
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


PRESETS: dict[str, ModelDims] = {
    "tiny": ModelDims(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32, text_len=32, freq_dim=64),
    # The size at which benchmarks/ measures; big enough that arithmetic dominates on one CPU core.
    "bench": ModelDims(dim=512, ffn_dim=2048, num_heads=8, num_layers=8, text_dim=4096, text_len=512),
    "wan2.1-1.3b": ModelDims(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096),
    "wan2.1-14b": ModelDims(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096),
}


@dataclass(frozen=True)
class ModelConfig:
    """`preset` names the sizes. `checkpoint`, `text_encoder` and `vae` are paths; the tiny preset makes its own."""

    preset: str = "tiny"
    checkpoint: str = ""
    text_encoder: str = ""
    vae: str = ""
    dtype: str = "float32"
    device: str = "auto"
    attention_backend: str = "auto"
    weights_seed: int = 0
    cache_dir: str = ""


@dataclass(frozen=True)
class GeometryConfig:
    """Pixels, and latent frames: `frames_per_chunk` is F, `context_frames` K, `window_frames` W of the contract."""

    height: int = 64
    width: int = 96
    frames_per_chunk: int = 3
    context_frames: int = 3
    window_frames: int = 6
    sink_frames: int = 0


@dataclass(frozen=True)
class ScheduleConfig:
    """Denoising. `recompute` with `anchor = "reencode"` is regime R0a, with "latent" R0, without recompute R1."""

    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    base_seed: int = 42
    kv_cache_attention_bias: float = 0.3
    recompute: bool = True
    anchor: str = "reencode"
    clean_pass: bool = False


@dataclass(frozen=True)
class PlanConfig:
    """Which plan, on how many mesh ranks (`tp`). The pp plans put Stage 0 on a rank of its own before them."""

    tp_plan: str = "v1_generator_only"
    tp: int = 1


@dataclass(frozen=True)
class PipelineConfig:
    """The pp plans. Depths of the queue of envelopes on their way to the mesh (`d_in`) and of results that wait for
    decode (`d_out`); how long the comms thread may take to end, in seconds; whether Stage 0 decodes up to the anchor,
    sends the next envelope, and only then decodes the rest (`anchor_first`, regime R0a); what a hard cut does with
    chunks in flight: `discard` them as stale, or `finish` them first."""

    d_in: int = 2
    d_out: int = 2
    join_timeout_s: float = 20.0
    anchor_first: bool = True
    cut: str = "discard"


@dataclass(frozen=True)
class CommConfig:
    backend: str = "auto"
    dist_timeout_s: float = 60.0
    join_timeout_s: float = 30.0
    max_meta_bytes: int = 1 << 20
    max_tensors: int = 64
    max_payload_bytes: int = 2 << 30
    threads_per_rank: int = 1


@dataclass(frozen=True)
class LivenessConfig:
    """Seconds. The leader's heartbeat, the longest wait for a header, and the budgets of phase B, loading, warm-up
    (compilation included) and of a drain."""

    heartbeat_s: float = 2.0
    watchdog_s: float = 15.0
    phase_budget_s: float = 60.0
    load_budget_s: float = 600.0
    warmup_budget_s: float = 600.0
    drain_deadline_s: float = 30.0


@dataclass(frozen=True)
class TripwireConfig:
    """Cadence of each check in chunks; 0 is off. In the parity set, since each check is a collective.

    The shard fingerprint is also taken at each hard cut, unless it is off.
    """

    input_digest_every: int = 1
    output_digest_every: int = 1
    kv_digest_every: int = 64
    fingerprint_every: int = 64


@dataclass(frozen=True)
class RunConfig:
    """What to make: `chunks` chunks from `timeline` (a file) or `prompt`.

    `record_frames` keeps each chunk's frame, and samples of every rank's cache, for `tpctl kv-audit --deep`.
    """

    chunks: int = 4
    prompt: str = "a small boat on a calm lake at sunrise"
    timeline: str = ""
    record_latents: bool = False
    record_frames: bool = False


@dataclass(frozen=True)
class SinkConfig:
    """`kinds`, any of mp4, sheet, raw, null; the files are written into `directory`."""

    kinds: tuple[str, ...] = ("mp4", "sheet")
    directory: str = ""
    fps: int = 16


@dataclass(frozen=True)
class DrillConfig:
    """A fault to plant, for drills alone: nothing is planted while `id` is empty (see `engine.faults`).

    The victim breaks at chunk `at_chunk`. `without_guard` also switches off the guard that should notice, which proves
    that the guard, not luck, passes the drill. `differs`, as `section.key=value`, holds on the victim only; all other
    values are in the parity set like any other. `debug_collective` gates one more collective in that chunk.
    """

    id: str = ""
    victim_rank: int = 0
    at_chunk: int = 2
    without_guard: bool = False
    differs: str = ""
    debug_collective: bool = False


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
    sink: SinkConfig = field(default_factory=SinkConfig)
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


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where each dotted key got its value."""

    config: EngineConfig
    origins: Mapping[str, str]


@dataclass(frozen=True)
class RankEnv:
    """What the launcher says about this process. `rank` is global."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    attempt: int

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RankEnv:
        try:
            return cls(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
                master_addr=environ["MASTER_ADDR"],
                master_port=int(environ["MASTER_PORT"]),
                attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
        except KeyError as error:
            raise ConfigError(
                f"{error.args[0]} is not set: a rank is started by torchrun, not by hand",
                code="TP-1002",
                next_step="tpctl bringup",
            ) from error
        except ValueError as error:
            raise ConfigError(f"the launcher's environment is malformed: {error}", code="TP-1002") from error


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
            raise _unknown(name, SECTIONS, where)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: [{name}] must be a table", code="TP-1003", where=where)
        hints = typing.get_type_hints(SECTIONS[name])
        parsed = {}
        for key, value in values.items():
            if key not in hints:
                raise _unknown(f"{name}.{key}", [f"{name}.{k}" for k in hints], where)
            parsed[key] = _convert(value, hints[key], f"{name}.{key}", where)
        sections[name] = SECTIONS[name](**parsed)
    config = EngineConfig(**sections)
    config = dataclasses.replace(
        config, plan=dataclasses.replace(config.plan, tp_plan=canonical_plan(config.plan.tp_plan))
    )
    validate(config)
    return config


def load(
    files: Sequence[tuple[str, Path]] = (),
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge files (weakest first), `TPCTL_*` variables and dotted overrides; validate once.

    Args:
        files: (origin name, path) pairs; a missing file is an error.
        environ: the environment to read, or none.
        overrides: dotted key to value, from flags; text is parsed by the key's type.
    """
    data: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(dotted_keys(), "default")
    known = dotted_keys()

    def put(dotted: str, value: Any, origin: str) -> None:
        section, key = dotted.split(".", 1)
        data.setdefault(section, {})[key] = value
        origins[dotted] = origin

    for origin, path in files:
        for section, values in read_toml(path).items():
            if section not in SECTIONS:
                raise _unknown(section, SECTIONS, str(path))
            if not isinstance(values, Mapping):
                raise ConfigError(f"{path}: [{section}] must be a table", code="TP-1003", where=str(path))
            for key, value in values.items():
                dotted = f"{section}.{key}"
                if dotted not in known:
                    raise _unknown(dotted, [k for k in known if k.startswith(section + ".")], str(path))
                put(dotted, _convert(value, known[dotted], dotted, str(path)), f"{origin}: {path}")
    by_variable = {"TPCTL_" + dotted.replace(".", "_").upper(): dotted for dotted in known}
    for variable, text in sorted((environ or {}).items()):
        if variable in by_variable:
            dotted = by_variable[variable]
            put(dotted, parse_text(text, known[dotted], dotted, variable), f"environment: {variable}")
    for dotted, value in (overrides or {}).items():
        if dotted not in known:
            raise _unknown(dotted, known, "flag")
        parsed = parse_text(value, known[dotted], dotted, "flag") if isinstance(value, str) else value
        put(dotted, _convert(parsed, known[dotted], dotted, "flag"), "flag")
    return Loaded(from_dict(data), origins)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", code="TP-1004", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", code="TP-1005", where=str(path)) from error


def parse_text(text: str, kind: Any, dotted: str, where: str) -> Any:
    """A flag's or variable's text as the key's type. Lists are separated by commas."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{where}: {dotted} must be {_type_name(kind)}, is {text!r}", code="TP-1006", where=where
        ) from error
    return text


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
    if config.run.chunks < 1:
        raise ConfigError(f"run.chunks must be at least 1, is {config.run.chunks}", code="TP-1010")
    if config.sink.fps < 1:
        raise ConfigError(f"sink.fps must be at least 1, is {config.sink.fps}", code="TP-1010")
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
    drill = config.drill
    if not drill.id and drill != DrillConfig():
        raise ConfigError("drill.* says how to break a job, but drill.id names no drill", code="TP-1013")
    if not 0 <= drill.victim_rank < config.world_size or drill.at_chunk < 0:
        raise ConfigError(
            f"drill.victim_rank must be a rank of {config.world_size} and drill.at_chunk at least 0, "
            f"are {drill.victim_rank} and {drill.at_chunk}",
            code="TP-1013",
        )


CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": tuple(PRESETS),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attention_backend": ("auto", "sdpa", "flex"),
    "schedule.anchor": ("reencode", "latent"),
    "comm.backend": ("auto", "gloo", "nccl"),
    "plan.tp_plan": PLANS,
    "pipeline.cut": ("discard", "finish"),
}
SINK_KINDS = ("mp4", "sheet", "raw", "null")


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
    if config.plan.tp_plan in PP_PLANS and config.drill.id:
        raise ConfigError(f"there is no drill '{config.drill.id}' for plan {config.plan.tp_plan}", code="TP-1013")


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


def valid_degrees(dims: ModelDims, limit: int = 64) -> list[int]:
    """Tensor-parallel degrees that divide heads and FFN."""
    return [n for n in range(1, min(limit, dims.num_heads) + 1) if dims.num_heads % n == 0 and dims.ffn_dim % n == 0]


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


def _convert(value: Any, kind: Any, dotted: str, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and all(_is(v, item) for v in value):
            return tuple(value)
    elif isinstance(kind, types.UnionType):
        if any(_is(value, option) for option in typing.get_args(kind)):
            return value
    elif kind is float and _is(value, int):
        return float(value)
    elif _is(value, kind):
        return value
    raise ConfigError(f"{where}: {dotted} must be {_type_name(kind)}, is {value!r}", code="TP-1006", where=where)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def _unknown(name: str, known: typing.Iterable[str], where: str) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return ConfigError(
        f"{where}: unknown key '{name}'{hint}",
        code="TP-1008",
        where=where,
        evidence={"key": name, "nearest": near[0] if near else None},
        next_step="tpctl config show",
    )
