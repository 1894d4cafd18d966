"""Figures of a case, from its reports. A figure that was not reported is None, never a guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpctl.matrix.observation import Observation
from tpctl.verdict import Finding

MIB = 1 << 20


def metrics(seen: Observation, findings: Sequence[Finding]) -> dict[str, Any]:
    """Times in s or ms, sizes in bytes, as the names say. Periods leave out the first chunk, which warms things."""
    by_gate = {finding.id: finding for finding in findings}
    chunks = list(seen.leader.get("chunks") or [])
    steady = chunks[1:] or chunks
    periods = _values(steady, "period_ms")
    frames = {key: int(value.shape[0]) for key, value in (seen.pixels or {}).items()}
    steady_frames = sum(count for key, count in frames.items() if key != "chunk_00000") or sum(frames.values())
    ranks = {
        str(rank): {
            "role": report.get("role"),
            "exit_code": report.get("exit_code"),
            "peak_rss_bytes": report.get("memory", {}).get("peak_rss_bytes"),
            "rss_ready_bytes": report.get("memory", {}).get("rss_ready_bytes"),
            "ready_s": report.get("times", {}).get("ready_s"),
            "collectives_per_call": report.get("generator", {}).get("collectives_per_call"),
            "shard_bytes": report.get("generator", {}).get("shard_bytes"),
            "kv_cache_bytes": report.get("generator", {}).get("kv_cache_bytes"),
            "graphs": report.get("generator", {}).get("graphs"),
            "graph_breaks": report.get("generator", {}).get("graph_breaks"),
            "compile_s": report.get("generator", {}).get("compile_s"),
            "attention_backend": report.get("effective", {}).get("attention_backend"),
            "warnings": list(report.get("warnings") or []),
        }
        for rank, report in sorted(seen.reports.items())
    }
    overlap = seen.leader.get("generator", {}).get("overlap") or {}
    workers = [row for rank, row in ranks.items() if rank != "0"] or list(ranks.values())
    worker_peak, leader_peak = _most(workers, "peak_rss_bytes"), ranks.get("0", {}).get("peak_rss_bytes")
    return {
        "regime": seen.leader.get("effective", {}).get("regime"),
        "overlap_score": overlap.get("score"),
        "stage0_p50_ms": overlap.get("stage0_ms"),
        "stage1_p50_ms": overlap.get("stage1_ms"),
        "mesh_idle_p50_ms": overlap.get("mesh_idle_ms"),
        "latents_error": _value(by_gate, "latents-equal"),
        "pixels_error": _value(by_gate, "pixels-equal"),
        "calls_expected": sum(chunk["expected_generator_calls"] for chunk in chunks) if chunks else None,
        "calls_observed": sum(chunk["observed_generator_calls"] for chunk in chunks) if chunks else None,
        "digests_checked": _value(by_gate, "digests"),
        "frames": sum(frames.values()) if frames else None,
        "worker_peak_bytes": worker_peak,
        "leader_peak_bytes": leader_peak,
        # What no build of a library changes much, as it does each of the two.
        "worker_spares_bytes": leader_peak - worker_peak if leader_peak and worker_peak and len(ranks) > 1 else None,
        "worker_ready_s": _most(workers, "ready_s"),
        "ready_s": _most(list(ranks.values()), "ready_s"),
        "graphs": _most(list(ranks.values()), "graphs"),
        "compile_s": _most(list(ranks.values()), "compile_s"),
        "period_p50_ms": percentile(periods, 50),
        "period_p90_ms": percentile(periods, 90),
        "period_p99_ms": percentile(periods, 99),
        "t_a_p50_ms": percentile(_values(steady, "t_a_ms"), 50),
        "t_b_p50_ms": percentile(_values(steady, "t_b_ms"), 50),
        "t_c_p50_ms": percentile(_values(steady, "t_c_ms"), 50),
        "fps": 1e3 * steady_frames / sum(periods) if periods and steady_frames else None,
        "teardown_s": teardown_s(seen),
        "wall_s": seen.outcome.wall_s if seen.outcome else None,
        "ranks": ranks,
    }


def teardown_s(seen: Observation) -> float | None:
    """From the last word of a rank to the end of the launcher; None without either."""
    if seen.outcome is None or not seen.reports:
        return None
    return max(0.0, seen.outcome.ended_at - max(float(report["written_at"]) for report in seen.reports.values()))


def percentile(values: Sequence[float], q: float) -> float | None:
    import numpy as np

    return float(np.percentile(values, q)) if values else None


def _values(chunks: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(chunk[key]) for chunk in chunks if chunk.get(key) is not None]


def _value(findings: dict[str, Finding], name: str) -> Any:
    found = findings.get(name)
    return found.value if found is not None and isinstance(found.value, int | float) else None


def _most(rows: Sequence[dict[str, Any]], key: str) -> Any:
    return max((row[key] for row in rows if row[key] is not None), default=None)
