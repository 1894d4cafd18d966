"""From sizes and a device: does each plan fit, what binds it, and about how fast it is.

The estimate is a roofline: a call takes the longest of its arithmetic, its memory traffic and the handing over of its
operations, and the sums over the mesh come on top. Stage 0's share is scaled from one published figure. It ranks plans
and shows what binds; `tpctl bringup` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import EngineConfig, valid_degrees
from engine.plan import PP0, PP1, PP_PLANS, TP_PLANS, V0, V11A, V11B
from tpctl.planner.devices import Device
from tpctl.planner.sizes import Sizes, sizes

GB = 1e9
HEADROOM = 0.90  # of a device's memory: the allocator, the backend and the runtime take the rest
OPERATION_S = 8e-6  # to hand one operation to the backend
# As written; and of a compiled block 10 products, 5 sums, 2 attentions, 10 fused kernels, and what the cache takes.
OPERATIONS_PER_BLOCK, OPERATIONS_COMPILED = 90, 33
SUM_LATENCY_S = 12e-6  # of a collective that carries next to nothing, between GPUs of one host
# Stage 0 of a 14B job at 320x576, twelve pixel frames a chunk, on an H200: 107 ms to decode, about a fifth to encode.
DECODE_MS, DECODE_PIXELS, DECODE_TFLOPS = 107.0, 12 * 320 * 576, 989.0
ENCODE_SHARE = 0.2
TEXT_ENCODER_BYTES, VAE_BYTES, VAE_WORKING_BYTES = 12 * 10**9, 250 * 10**6, 1500 * 10**6
PROCESS_BYTES = 230 * 10**6  # a process that has loaded torch and done a call
LIBRARIES_BYTES = 200 * 10**6  # what the libraries of Stage 0 add to it
MADE_STAGE0_BYTES = 150 * 10**6  # text encoder and VAE made from a seed, at work


@dataclass(frozen=True)
class Pace:
    """`efficiency`: which part of a device's arithmetic the generator reaches."""

    efficiency: float = 0.35


@dataclass(frozen=True)
class Estimate:
    """One plan at one degree. Bytes by role; times in ms; None where the device's figures are not known.

    `fits` is None where it cannot be told. `stage0_ms` is phases A and C of one chunk.
    """

    plan: str
    tp: int
    ranks: int
    divides: bool
    rank0_bytes: int | None = None
    worker_bytes: int | None = None
    fits: bool | None = None
    calls: int | None = None
    call_ms: float | None = None
    binds: str | None = None
    sums_ms: float | None = None
    stage0_ms: float | None = None
    period_ms: float | None = None
    fps: float | None = None
    link_mb: float | None = None


def estimates(config: EngineConfig, device: Device, most_tp: int, pace: Pace) -> Iterator[Estimate]:
    """Every plan at every degree up to `most_tp`, those that do not divide included, so that nobody tries them."""
    degrees = valid_degrees(config.dims)
    for plan in (*TP_PLANS, *PP_PLANS):
        for tp in range(1, most_tp + 1):
            if plan == PP0 and tp > 1:
                continue
            ranks = tp + (plan in PP_PLANS)
            if tp not in degrees:
                yield Estimate(plan, tp, ranks, divides=False)
            else:
                yield estimate(config, plan, tp, device, pace)


def estimate(config: EngineConfig, plan: str, tp: int, device: Device, pace: Pace) -> Estimate:
    """One plan at a degree that divides the model."""
    found = sizes(config, tp)
    stage0 = stage0_bytes(config)
    rank0 = PROCESS_BYTES + stage0 + (0 if plan in PP_PLANS else found.rank_bytes)
    worker = None
    if tp > 1 or plan in PP_PLANS:
        worker = PROCESS_BYTES + found.rank_bytes + _of_stage0(plan, config)
    room = device.memory_gb * GB * HEADROOM
    # Processors of one host share its memory; devices have their own.
    needed = rank0 + (worker or 0) * (tp if plan in PP_PLANS else tp - 1) if device.name == "cpu" else None
    fits = needed <= room if needed is not None else max(rank0, worker or 0) <= room
    operations = OPERATIONS_COMPILED if config.model.compile == "inductor" else OPERATIONS_PER_BLOCK
    call_ms, binds, sums_ms = _call(found, config.dims.num_layers * operations, tp, device, pace)
    a_c_ms = _stage0_ms(config, device)
    period_ms = fps = None
    if call_ms is not None and a_c_ms is not None:
        b_ms = found.calls * call_ms
        anchor_ms = _anchor_ms(config, a_c_ms)
        period_ms = max(a_c_ms, b_ms + anchor_ms) if plan in (PP0, PP1) else a_c_ms + b_ms
        fps = 1e3 * 4 * config.geometry.frames_per_chunk / period_ms
        if plan in (PP0, PP1):
            binds = "stage 0" if a_c_ms > b_ms + anchor_ms else binds
        elif a_c_ms > b_ms:
            binds = "stage 0"
    crosses = found.envelope_bytes + (found.result_bytes if plan in PP_PLANS else 0)
    return Estimate(
        plan,
        tp,
        tp + (plan in PP_PLANS),
        divides=True,
        rank0_bytes=rank0,
        worker_bytes=worker,
        fits=fits,
        calls=found.calls,
        call_ms=call_ms,
        binds=binds,
        sums_ms=sums_ms,
        stage0_ms=a_c_ms,
        period_ms=period_ms,
        fps=fps,
        link_mb=0.0 if plan == V0 else crosses / 1e6,
    )


def stage0_bytes(config: EngineConfig) -> int:
    """Text encoder and VAE as they lie on disk, where paths are given; else as published for Wan2.1."""
    if _made(config):
        return LIBRARIES_BYTES + MADE_STAGE0_BYTES
    text = _on_disk(config.model.text_encoder) or TEXT_ENCODER_BYTES
    vae = _on_disk(config.model.vae) or VAE_BYTES
    return LIBRARIES_BYTES + text + vae + VAE_WORKING_BYTES


def _made(config: EngineConfig) -> bool:
    """Whether Stage 0's models are the small ones that are made from a seed."""
    return config.model.preset in ("tiny", "bench") and not config.model.text_encoder


def _of_stage0(plan: str, config: EngineConfig) -> int:
    """What a worker of this plan holds of Stage 0's parts."""
    if plan == V0:
        return stage0_bytes(config)
    if plan in (V11A, V11B):
        return min(stage0_bytes(config), VAE_BYTES + VAE_WORKING_BYTES)
    return 0


def _call(
    found: Sizes, operations: int, tp: int, device: Device, pace: Pace
) -> tuple[float | None, str | None, float | None]:
    """ms of one generator call, what binds it, and ms of its sums."""
    if device.tflops is None or device.bandwidth_gb_s is None or device.link_gb_s is None:
        return None, None, None
    arithmetic = found.call_flops / (device.tflops * 1e12 * pace.efficiency)
    memory = found.call_read_bytes / (device.bandwidth_gb_s * GB)
    ring = 2 * (tp - 1) / tp
    sums = found.sums * SUM_LATENCY_S + ring * found.sum_bytes / (device.link_gb_s * GB)
    launches = operations * OPERATION_S
    parts = {"arithmetic": arithmetic, "memory": memory, "launches": launches, "collectives": sums}
    return 1e3 * (max(arithmetic, memory, launches) + sums), max(parts, key=parts.__getitem__), 1e3 * sums


def _stage0_ms(config: EngineConfig, device: Device) -> float | None:
    if device.tflops is None or _made(config):
        return None  # nobody published a figure of the made VAE
    geometry = config.geometry
    pixels = 4 * geometry.frames_per_chunk * geometry.height * geometry.width
    decode = DECODE_MS * pixels / DECODE_PIXELS * DECODE_TFLOPS / device.tflops
    return decode * (1 + ENCODE_SHARE)


def _anchor_ms(config: EngineConfig, stage0_ms: float) -> float:
    """What the next envelope must wait for: one latent's decode and one encode, where the anchor is re-encoded."""
    if not config.schedule.recompute or config.schedule.anchor != "reencode":
        return 0.0
    decode = stage0_ms / (1 + ENCODE_SHARE)
    share = 1 / config.geometry.frames_per_chunk if config.pipeline.anchor_first else 1.0
    return decode * (share + ENCODE_SHARE)


def _on_disk(path: str) -> int:
    from pathlib import Path

    root = Path(path)
    if not path or not root.exists():
        return 0
    files = [root] if root.is_file() else root.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)
