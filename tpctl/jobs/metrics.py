"""A job's metrics in Prometheus' text format: what is seen of it from outside, and what rank 0 counts of its stream.

What is seen needs nobody's answer, so a wedged or dead job has metrics too. What rank 0 counts comes over the control
socket; `tpctl_control_up` says whether it came. Nothing here touches a process group, or waits for Stage 0's loop.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine.lifecycle import RankExit
from tpctl.errors import JobError
from tpctl.failuremodes import FAILURE_MODES
from tpctl.jobs.health import STARVES, JobState
from tpctl.jobs.line import Line
from tpctl.jobs.place import JobDir
from tpctl.jobs.view import Look, look
from tpctl.reports import read_reports

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
HOST = "127.0.0.1"
ANSWER_S = 2.0


class JobCollector(Collector):
    """Looks at a job each time it is asked. Attempts that are over are read once."""

    def __init__(self, job: JobDir) -> None:
        self._job = job
        self._over: dict[int, dict[str, int]] = {}

    def collect(self) -> Iterator[Metric]:
        found = look(self._job)
        yield from _job(found)
        yield from _stream(found)
        yield from _ranks(found)
        yield self._tripwires(found)
        inside = self._inside(found)
        yield GaugeMetricFamily("tpctl_control_up", "Whether rank 0 answers its control socket.", int(bool(inside)))
        yield from inside

    def _inside(self, found: Look) -> list[Metric]:
        """Rank 0's own; nothing if it does not answer."""
        if not any(rank.alive for rank in found.seen.ranks):
            return []
        try:
            with Line(self._job, ANSWER_S) as line:
                text = line.ask({"id": uuid.uuid4().hex, "op": "metrics"})["text"]
        except JobError:
            return []
        return list(text_string_to_metric_families(text))

    def _tripwires(self, found: Look) -> Metric:
        """Ranks that ended by a tripwire, over all attempts."""
        totals = dict.fromkeys(sorted({*FAILURE_MODES, "none"}), 0)
        for attempt in found.seen.record.attempts:
            counted = self._over.get(attempt.number)
            if counted is None:
                counted = _tripped(self._job.run_dir(attempt.number))
                if attempt.ended_at is not None:
                    self._over[attempt.number] = counted
            for fm, count in counted.items():
                totals[fm] = totals.get(fm, 0) + count
        family = CounterMetricFamily("tpctl_tripwires", "Ranks that a tripwire ended, by failure mode.", labels=("fm",))
        for fm, count in totals.items():
            family.add_metric((fm,), count)
        return family


def registry(job: JobDir) -> CollectorRegistry:
    """One that tells of this job."""
    found = CollectorRegistry()
    found.register(JobCollector(job))
    return found


def text(job: JobDir) -> str:
    """The whole exposition, made now.

    Raises:
        JobError: the job's record or configuration cannot be read.
    """
    return prometheus_client.generate_latest(registry(job)).decode()


def serve(job: JobDir, port: int) -> int:
    """Answer GET on 127.0.0.1 from threads of this process; returns the port, which is a free one for 0.

    Raises:
        JobError: the port cannot be had.
    """
    try:
        server, _ = prometheus_client.start_http_server(port, HOST, registry(job))
    except OSError as error:
        raise _no_port(port, error) from error
    return int(server.server_port)


def check_port(port: int) -> None:
    """Raises JobError: metrics could not be served there now."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except OSError as error:
        raise _no_port(port, error) from error


def _no_port(port: int, error: OSError) -> JobError:
    return JobError(
        f"metrics cannot be served on {HOST}:{port}: {error.strerror}",
        code="TP-7856",
        next_step="tpctl up --metrics-port 0",
    )


def _tripped(run_dir: Path) -> dict[str, int]:
    counted: dict[str, int] = {}
    for report in read_reports(run_dir).values():
        if report.get("exit_code") == RankExit.TRIPWIRE:
            fm = (report.get("error") or {}).get("fm") or "none"
            counted[fm] = counted.get(fm, 0) + 1
    return counted


def _job(found: Look) -> Iterator[Metric]:
    record, health = found.seen.record, found.health
    info = GaugeMetricFamily("tpctl_job_info", "1, with what the job is.", labels=("name", "job_id", "tp_plan"))
    info.add_metric((record.name, record.job_id, record.tp_plan), 1)
    yield info
    state = GaugeMetricFamily("tpctl_job_state", "1 for the state that the job is in.", labels=("state",))
    for one in JobState:
        state.add_metric((one.value,), int(one is health.state))
    yield state
    starved = GaugeMetricFamily(
        "tpctl_job_starved_by", "1 for what the mesh waits for, if that is not the mesh.", labels=("by",)
    )
    for doing in STARVES:
        starved.add_metric((doing.value,), int(doing is health.starved_by))
    yield starved
    yield CounterMetricFamily("tpctl_job_restarts", "Starts after a failure.", record.restarts)
    ranks = GaugeMetricFamily("tpctl_ranks", "Ranks that are to run, and that live.", labels=("which",))
    ranks.add_metric(("expected",), record.world_size)
    ranks.add_metric(("alive",), sum(rank.alive for rank in found.seen.ranks))
    yield ranks


def _stream(found: Look) -> Iterator[Metric]:
    chunks = CounterMetricFamily("tpctl_chunks", "Chunks of this attempt, by fate.", labels=("fate",))
    for fate in ("accepted", "emitted", "dropped"):
        chunks.add_metric((fate,), found.health.account.get(fate, 0))
    yield chunks
    if found.health.frame_age_s is not None:
        yield GaugeMetricFamily(
            "tpctl_last_frame_age_seconds", "Since the last chunk was emitted.", found.health.frame_age_s
        )


def _ranks(found: Look) -> Iterator[Metric]:
    memory = GaugeMetricFamily("tpctl_rank_resident_memory_bytes", "Memory a rank holds now.", labels=("rank",))
    age = GaugeMetricFamily(
        "tpctl_rank_commitment_age_seconds", "Since the rank's last commitment point.", labels=("rank",)
    )
    for rank in found.seen.ranks:
        if rank.rss_bytes is not None:
            memory.add_metric((str(rank.rank),), rank.rss_bytes)
        if rank.alive and rank.last is not None:
            age.add_metric((str(rank.rank),), (found.seen.now_ns - rank.last.t_ns) / 1e9)
    yield memory
    yield age
