"""A job as commands show it: one look, and the rows made of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from engine.config import load
from tpctl.errors import JobError
from tpctl.jobs.health import Health, judge
from tpctl.jobs.observe import Seen, observe
from tpctl.jobs.place import JobDir
from tpctl.output import Column
from tpctl.verdict import Finding, Verdict

COLUMNS = [
    Column("job", "name"),
    Column("state", "state"),
    Column("verdict", "verdict"),
    Column("plan", "tp_plan"),
    Column("ranks", "world_size", right=True),
    Column("chunks", "emitted", right=True),
    Column("last frame s", "frame_age_s", right=True),
    Column("period s", "period_s", right=True),
    Column("restarts", "restarts", right=True),
    Column("up s", "age_s", narrow=False, right=True),
    Column("hosts", "nnodes", narrow=False, right=True),
    Column("node", "node_rank", narrow=False, right=True),
    Column("supervisor", "supervisor_pid", narrow=False, right=True),
]
RANK_COLUMNS = [
    Column("rank", "rank", right=True),
    Column("state", "state"),
    Column("phase", "phase"),
    Column("last commitment", "commitment"),
    Column("chunk", "chunk_index", right=True),
    Column("age s", "commitment_age_s", right=True),
    Column("MiB", "rss_mib", right=True),
    Column("pid", "pid", narrow=False, right=True),
    Column("process", "process", narrow=False),
    Column("epoch", "cache_epoch", narrow=False, right=True),
]


@dataclass(frozen=True)
class Look:
    """A job at one moment, judged."""

    job: JobDir
    seen: Seen
    health: Health


def look(job: JobDir) -> Look:
    """Raises JobError: its record or its configuration cannot be read."""
    seen = observe(job)
    return Look(job, seen, judge(seen, load([("job", job.config)]).config))


def row(found: Look) -> dict[str, Any]:
    """The job in one row."""
    record, health = found.seen.record, found.health
    return {
        "name": record.name,
        "job_id": record.job_id,
        "state": health.state.value,
        "verdict": health.verdict.value,
        "tp_plan": record.tp_plan,
        "world_size": record.world_size,
        "emitted": health.account.get("emitted"),
        "account": health.account,
        "frame_age_s": health.frame_age_s,
        "period_s": health.period_s,
        "restarts": record.restarts,
        "nnodes": record.nnodes,
        "node_rank": record.node_rank,
        "age_s": _age_s(found.seen),
        "supervisor_pid": record.supervisor.pid if record.supervisor else None,
    }


def _age_s(seen: Seen) -> float:
    """How long its supervisor has run, on a clock that nobody sets; of a job that is over, how long it did."""
    record = seen.record
    if seen.supervisor_alive and record.supervisor is not None:
        return record.supervisor.age_s()
    return max(0.0, (record.ended_at or time.time()) - record.created_at)


def unreadable(name: str, error: JobError) -> tuple[dict[str, Any], Finding]:
    """A job that exists and cannot be read."""
    blank: dict[str, Any] = dict.fromkeys(column.key for column in COLUMNS)
    one = {**blank, "name": name, "job_id": None, "account": {}, "state": "unknown", "verdict": Verdict.UNKNOWN.value}
    return one, Finding("job.evidence", Verdict.UNKNOWN, error.message, where=name, next=error.next_step)


def rank_rows(seen: Seen) -> list[dict[str, Any]]:
    """One row a rank, from its black box and its process."""
    rows = []
    for rank in seen.ranks:
        last = rank.last
        rows.append(
            {
                "rank": rank.rank,
                "state": rank.state.value if rank.alive or rank.state.value in ("exited", "aborted") else "gone",
                "phase": (rank.phase if rank.alive else rank.live.phase) or None,
                "commitment": last.action if last else None,
                "chunk_index": last.chunk_index if last and last.chunk_index >= 0 else None,
                "cache_epoch": last.cache_epoch if last and last.cache_epoch >= 0 else None,
                "commitment_age_s": (seen.now_ns - last.t_ns) / 1e9 if last and seen.same_boot else None,
                "rss_mib": rank.rss_bytes // (1 << 20) if rank.rss_bytes is not None else None,
                "pid": rank.process.pid,
                "process": rank.letter or None,
            }
        )
    return rows
