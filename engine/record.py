"""The record of one chunk, as it stands in a rank's report, and the clock that times its stages."""

from __future__ import annotations

import time
from typing import Any

from engine.plan import ChunkPlan
from engine.report import rss_bytes
from engine.stage1 import MeshResult
from engine.wire.envelope import Envelope


def decisions(plan: ChunkPlan, call_id: int) -> dict[str, Any]:
    """What was decided of a chunk before its phase B, and under which call: in every record of it, whoever keeps it."""
    return {
        "chunk_index": plan.chunk_index,
        "call_id": call_id,
        "cache_epoch": plan.cache_epoch,
        "control_epoch": plan.control_epoch,
        "current_start_frame": plan.current_start_frame,
        "do_kv_recompute": plan.do_kv_recompute,
        "num_denoise_steps": plan.num_denoise_steps,
        "kv_cache_attention_bias": plan.kv_cache_attention_bias,
        "init_cache": plan.init_cache,
        "reset_crossattn_cache": plan.reset_crossattn_cache,
        "expected_generator_calls": plan.expected_calls,
    }


def chunk_record(envelope: Envelope, call_id: int, result: MeshResult, times: dict[str, Any]) -> dict[str, Any]:
    return {
        **decisions(envelope.plan, call_id),
        "start_frame": result.start_frame,
        "observed_generator_calls": result.observed_generator_calls,
        "input_digest_i64": result.input_digest_i64,
        "output_digest_i64": result.output_digest_i64,
        "graphs": result.graphs,
        **times,
        "t_b_ms": result.t_b_ms,
        "t_wait_ms": result.t_wait_ms,
        "tB0_ns": result.began_ns,
        "rss_bytes": rss_bytes(),
    }


class Clock:
    """Times of one chunk in milliseconds: `mark` a stage's end, `turn` at the chunk's.

    `ended_ns` is when the chunk's turn ended, on this host's monotonic clock, as in black boxes.
    """

    def __init__(self) -> None:
        self._start = self._last = time.monotonic_ns()
        self._times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.monotonic_ns()
        self._times[name] = (now - self._last) / 1e6
        self._last = now

    def restart(self) -> None:
        """Begin a chunk now: what went before belongs to none."""
        self._start = self._last = time.monotonic_ns()
        self._times = {}

    def turn(self) -> dict[str, Any]:
        times = self._times | {"period_ms": (self._last - self._start) / 1e6, "ended_ns": self._last}
        self._start, self._times = self._last, {}
        return times
