"""All jobs and their ranks at one moment: what `tpctl top` shows again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tpctl.errors import JobError
from tpctl.jobs import place
from tpctl.jobs.health import OVER
from tpctl.jobs.view import look, rank_rows, row, unreadable
from tpctl.output import Column, Table
from tpctl.verdict import Coverage, Finding, Verdict, worst

JOBS = [
    Column("job", "name"),
    Column("state", "state"),
    Column("verdict", "verdict"),
    Column("seen", "seen", right=True),
    Column("plan", "tp_plan", narrow=False),
    Column("chunks", "emitted", right=True),
    Column("frame age s", "frame_age_s", right=True),
    Column("period s", "period_s", right=True),
    Column("restarts", "restarts", right=True),
    Column("up s", "age_s", narrow=False, right=True),
]
RANKS = [
    Column("job", "job"),
    Column("rank", "rank", right=True),
    Column("state", "state"),
    Column("phase", "phase"),
    Column("last commitment", "commitment"),
    Column("age s", "commitment_age_s", right=True),
    Column("chunk", "chunk_index", right=True),
    Column("epoch", "cache_epoch", right=True),
    Column("MiB", "rss_mib", right=True),
    Column("pid", "pid", narrow=False, right=True),
    Column("process", "process", narrow=False),
]


@dataclass(frozen=True)
class Board:
    """`jobs` are rows of plain data, each with its `ranks`. `over` if nothing on it will move again."""

    taken_at: float
    jobs: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]
    verdict: Verdict
    coverage: Coverage
    over: bool

    def to_dict(self) -> dict[str, Any]:
        when = datetime.fromtimestamp(self.taken_at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"ts": when, "jobs": list(self.jobs)}

    def tables(self) -> list[Table]:
        ranks = [{**rank, "job": job["name"]} for job in self.jobs for rank in job["ranks"]]
        seen = [{**job, "seen": "{checked}/{expected}".format(**job["coverage"])} for job in self.jobs]
        shown = RANKS if len(self.jobs) > 1 else RANKS[1:]
        return [Table(JOBS, seen), *([Table(shown, ranks)] if ranks else [])]


def board(name: str | None) -> Board:
    """One look at a job, or at every job that is not over.

    Raises:
        JobError: the job that was named cannot be found or read.
    """
    jobs: list[dict[str, Any]] = []
    findings: list[Finding] = []
    verdicts: list[Verdict] = []
    over = name is not None
    checked = expected = 0
    for one in [name] if name is not None else place.names():
        try:
            found = look(place.find(one))
        except JobError as error:
            if name is not None:
                raise
            blank, problem = unreadable(one, error)
            jobs.append({**blank, "coverage": _coverage(Coverage(0, 1)), "ranks": []})
            findings.append(problem)
            verdicts.append(Verdict.UNKNOWN)
            expected += 1
            continue
        health = found.health
        if name is None and health.state in OVER:
            continue
        over = over and found.seen.over
        checked, expected = checked + health.coverage.checked, expected + health.coverage.expected
        jobs.append({**row(found), "coverage": _coverage(health.coverage), "ranks": rank_rows(found.seen)})
        verdicts.append(health.verdict)
        findings += [finding for finding in health.findings if name is not None or finding.verdict is not Verdict.PASS]
    verdict = worst(verdicts) if verdicts else Verdict.PASS
    return Board(time.time(), tuple(jobs), tuple(findings), verdict, Coverage(checked, expected), over)


def _coverage(found: Coverage) -> dict[str, int]:
    return {"checked": found.checked, "expected": found.expected}


def words(shown: Board) -> Sequence[str]:
    """What is to be said below the tables."""
    if not shown.jobs:
        return ["no job runs here"]
    return [f"{finding.verdict}  {finding.message}" for finding in shown.findings]
