"""The sections of a configuration: one frozen class each, its defaults beside its keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """`preset` names the sizes. `checkpoint`, `text_encoder` and `vae` are paths; the tiny preset makes its own.

    `compile` names the compiler of the generator's blocks: `off`, `inductor`, or `aot_eager` and `eager`, which make
    the same graphs and run them without kernels of their own.
    """

    preset: str = "tiny"
    checkpoint: str = ""
    text_encoder: str = ""
    vae: str = ""
    dtype: str = "float32"
    device: str = "auto"
    attention_backend: str = "auto"
    compile: str = "off"
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
    """What to make: `chunks` chunks (0: until drained) from `timeline` (a file) or `prompt`.

    `record_frames` keeps each chunk's frame, and samples of every rank's cache, for `tpctl kv-audit --deep`.
    """

    chunks: int = 4
    prompt: str = "a small boat on a calm lake at sunrise"
    timeline: str = ""
    record_latents: bool = False
    record_frames: bool = False


@dataclass(frozen=True)
class SourceConfig:
    """Video-to-video: the file `video` (empty: none), of which `noise_scale` is made noise: 1 leaves nothing of it.

    Frames are taken one by one, whatever the file's own rate. `on_end`: `stop` the stream, begin again (`loop`), or
    `hold` the last frame.
    """

    video: str = ""
    noise_scale: float = 0.7
    on_end: str = "stop"


@dataclass(frozen=True)
class SinkConfig:
    """`kinds`, any of mp4, sheet, raw, segments, preview, pipe, null; the files are written into `directory`.

    At most `queue_chunks` finished chunks wait for the sinks. `on_slow` says what happens to one more: the stream waits
    for them (`block`), the oldest that waits is dropped and counted (`drop-oldest`), or the job drains and ends with an
    error (`fail`).

    `segments`: one for each chunk, or at least `segment_s` seconds long; the newest `keep_segments` stay (0: all).
    `pipe`: frames for which there is no reader go nowhere (`discard`), wait for one (`wait`), or end the job (`fail`).
    """

    kinds: tuple[str, ...] = ("mp4", "sheet")
    directory: str = ""
    fps: int = 16
    on_slow: str = "block"
    queue_chunks: int = 2
    segment_s: float = 0.0
    keep_segments: int = 0
    no_reader: str = "discard"


@dataclass(frozen=True)
class LogConfig:
    """Each rank's log: the least level that is written, the size at which a file is set aside, and how many are kept
    beside the one in use."""

    level: str = "info"
    max_bytes: int = 4 << 20
    keep: int = 3


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
