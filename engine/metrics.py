"""What rank 0 counts of its stream while it runs, in the words of Prometheus: counters, histograms, gauges.

A chunk costs a few microseconds here. The text is made when somebody asks, in the asker's thread. What can be seen from
outside (states, memory, restarts, the age of the last frame) is not here: a wedged rank could not tell it.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine import __version__
from engine.config import EngineConfig
from engine.measures import overlap
from engine.plan import due

# From a tiny stream on a processor to a large one on too few devices.
BUCKETS_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
OVERLAP_CHUNKS = 64
STAGES = {"t_a_ms": "a", "t_frame_ms": "frame", "t_b_ms": "b", "t_c_ms": "c"}
REASONS = ("stale", "repeated", "slow_sink")


class StreamMetrics:
    """The metrics of one stream.

    Args:
        chunks: the newest chunk records, which the overlap is made of when it is asked for.
    """

    def __init__(self, config: EngineConfig, chunks: Sequence[Mapping[str, Any]]) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # one more gauge for each counter, which nobody reads
        self._cadence = config.tripwires
        own = self._registry = CollectorRegistry()
        self._period = Histogram(
            "tpctl_chunk_period_seconds", "From one emitted chunk to the next.", buckets=BUCKETS_S, registry=own
        )
        self._stage = Histogram(
            "tpctl_stage_seconds",
            "Time of a chunk in each stage: a prepares, frame sends, b generates, c decodes and emits.",
            ("stage",),
            buckets=BUCKETS_S,
            registry=own,
        )
        self._idle = Counter("tpctl_mesh_idle_seconds", "Time that the mesh waited for Stage 0.", registry=own)
        self._depth = Gauge(
            "tpctl_queue_depth", "Envelopes (d_in) and results (d_out) that wait.", ("queue",), registry=own
        )
        self._drops = Counter("tpctl_drops", "Results that were dropped, by reason.", ("reason",), registry=own)
        self._digests = Counter(
            "tpctl_digest_checks",
            "Agreements of the mesh behind accepted results, by tripwire.",
            ("check",),
            registry=own,
        )
        self._epoch = Gauge("tpctl_cache_epoch", "Hard cuts so far.", registry=own)
        self._control_epoch = Gauge("tpctl_control_epoch", "Changes of control parameters so far.", registry=own)
        build = Gauge(
            "tpctl_build_info", "1, with the version that runs.", ("version", "tp_plan", "regime"), registry=own
        )
        build.labels(__version__, config.plan.tp_plan, config.regime).set(1)
        for reason in REASONS:
            self._drops.labels(reason)
        for check in ("input", "output", "kv", "fingerprint"):
            self._digests.labels(check)
        own.register(_Overlap(chunks))

    def chunk(self, record: Mapping[str, Any]) -> None:
        """One more chunk record of rank 0. Its result was accepted, so the mesh made every check that was due."""
        self._period.observe(record["period_ms"] / 1e3)
        for key, stage in STAGES.items():
            if key in record:
                self._stage.labels(stage).observe(record[key] / 1e3)
        self._idle.inc(record.get("t_mesh_idle_ms", 0.0) / 1e3)
        for queue in ("d_in", "d_out"):
            if queue in record:
                self._depth.labels(queue).set(record[queue])
        cadence, chunk_index = self._cadence, record["chunk_index"]
        fingerprint = due(cadence.fingerprint_every, chunk_index) or (
            cadence.fingerprint_every > 0 and record["init_cache"]
        )
        for check, done in (
            ("input", due(cadence.input_digest_every, chunk_index)),
            ("output", due(cadence.output_digest_every, chunk_index)),
            ("kv", due(cadence.kv_digest_every, chunk_index)),
            ("fingerprint", fingerprint),
        ):
            if done:
                self._digests.labels(check).inc()
        self._epoch.set(record["cache_epoch"])
        self._control_epoch.set(record["control_epoch"])

    def dropped(self, reason: str) -> None:
        self._drops.labels(reason).inc()

    def count_requests(self, counts: Tally[tuple[str, str]]) -> None:
        """From now on tell the answers of the control socket too: (what was asked, how it went) to how often."""
        self._registry.register(_Requests(counts))

    def text(self) -> str:
        """All of it, in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry).decode()


class _Overlap(prometheus_client.registry.Collector):
    """OverlapScore of the newest chunks, made when it is asked for; nothing where Stage 0 is in the mesh."""

    def __init__(self, chunks: Sequence[Mapping[str, Any]]) -> None:
        self._chunks = chunks

    def collect(self) -> Iterator[Metric]:
        newest = self._chunks[-OVERLAP_CHUNKS:]
        found = overlap(newest) if newest and "tEmit_ms" in newest[-1] else None
        if found is not None:
            yield GaugeMetricFamily("tpctl_overlap_score", "Hidden part of the shorter stage, median.", found.score)


class _Requests(prometheus_client.registry.Collector):
    def __init__(self, counts: Tally[tuple[str, str]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "tpctl_control_requests", "Answers of the control socket.", labels=("op", "outcome")
        )
        for (op, outcome), count in sorted(self._counts.items()):
            family.add_metric((op, outcome), count)
        yield family
