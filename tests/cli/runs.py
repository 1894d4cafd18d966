"""Run directories as a healthy engine leaves them, for tests that then break one thing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tpctl.launch.local import Outcome
from tpctl.matrix.case import Case
from tpctl.matrix.observation import Observation
from tpctl.reports import read_reports

CASE = Case(id="case", title="t", tp=2, chunks=3, gates=("exit-codes",), reference="ref")
OUTCOME = Outcome(returncode=0, timed_out=False, wall_s=5.0, ended_at=2e9)


def chunk(index: int, epoch: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "chunk_index": index,
        "call_id": index + 1,
        "cache_epoch": epoch,
        "control_epoch": 0,
        "current_start_frame": 3 * index,
        "start_frame": 0,
        "do_kv_recompute": index > 0,
        "num_denoise_steps": 4,
        "kv_cache_attention_bias": 0.3,
        "init_cache": index == 0,
        "reset_crossattn_cache": index == 0,
        "expected_generator_calls": 4 + (index > 0),
        "observed_generator_calls": 4 + (index > 0),
        "t_a_ms": 1.0,
        "t_b_ms": 80.0,
        "t_c_ms": 20.0,
        "t_frame_ms": 1.0,
        "period_ms": 100.0 + index,
        "input_digest_i64": 11 + index,
        "output_digest_i64": 21 + index,
        **changes,
    }


def rank_report(rank: int, out: Path, chunks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    lead = rank == 0
    return {
        "schema": "tpctl.rank-report",
        "schema_version": 1,
        "rank": rank,
        "mesh_rank": rank,
        "role": "stage0+stage1" if lead else "stage1",
        "tp_plan": "v1_generator_only",
        "state": "exited",
        "exit_code": 0,
        "error": None,
        "pid": 1,
        "host": "h",
        "warnings": [],
        "effective": {"attention_backend": "sdpa"},
        "times": {"ready_s": 3.0 + lead},
        "memory": {"rss_ready_bytes": 1 << 20, "peak_rss_bytes": (2 + lead) << 20},
        "imported": {"transformers": lead, "diffusers": lead},
        "generator": {"collectives_per_call": 7, "shard_bytes": 1, "kv_cache_bytes": 2, "graphs": 1, "graph_breaks": 0},
        "chunks": chunks,
        "account": {"accepted": len(chunks), "emitted": len(chunks), "dropped": 0, "abandoned": 0} if lead else None,
        "outputs": {"mp4": str(out)} if lead else None,
        **changes,
    }


def tensors(chunks: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    random = np.random.default_rng(7)
    keys = [f"chunk_{i:05d}" for i in range(chunks)]
    latents = {key: random.standard_normal((1, 3, 4, 2, 2)).astype(np.float32) for key in keys}
    pixels = {key: random.integers(0, 255, (9 if i == 0 else 12, 4, 4, 3), np.uint8) for i, key in enumerate(keys)}
    return latents, pixels


def write_run(
    directory: Path,
    edit: Callable[[dict[int, dict[str, Any]]], None] = lambda reports: None,
    edit_tensors: Callable[[dict[str, Any], dict[str, Any]], None] = lambda latents, pixels: None,
    ranks: int = 2,
    chunks: int = 3,
) -> Path:
    """A healthy run directory with one thing edited."""
    (directory / "ranks").mkdir(parents=True)
    movie = directory / "out.mp4"
    movie.write_bytes(b"frames")
    reports = {rank: rank_report(rank, movie, [chunk(i) for i in range(chunks)]) for rank in range(ranks)}
    edit(reports)
    for rank, report in reports.items():
        (directory / "ranks" / f"rank{rank}.json").write_text(json.dumps(report))
    latents, pixels = tensors(chunks)
    edit_tensors(latents, pixels)
    if latents:
        save_file(latents, directory / "latents.safetensors")
        save_file(pixels, directory / "pixels.safetensors")
    return directory


def observe(directory: Path, case: Case = CASE, outcome: Outcome | None = OUTCOME, **links: Any) -> Observation:
    return Observation(case, directory, outcome, read_reports(directory), **links)
