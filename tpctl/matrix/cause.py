"""The first cause of a failed case: which rank, why, where its log is, what to type next. Judged as triage judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.referee.judge import Kind
from tpctl.errors import runbook_of
from tpctl.evidence import LAUNCHER_LOG, Seen, gather
from tpctl.matrix.observation import Observation
from tpctl.remains import rank_log, tail
from tpctl.triage import Triage, judge
from tpctl.verdict import Verdict


@dataclass(frozen=True)
class Cause:
    """Why a case failed. `rank` is None where the launcher itself is to blame, or where ranks only differ."""

    rank: int | None
    message: str
    code: str | None = None
    exit_code: int | None = None
    fm: str | None = None
    log: str | None = None
    tail: tuple[str, ...] = ()
    next: str | None = None
    runbook: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "tail": list(self.tail)}

    def lines(self) -> list[str]:
        """For people."""
        # Without a rank, a failure mode means that ranks differ and none of them is convicted.
        nobody = "launcher" if self.fm is None else self.fm
        who = nobody if self.rank is None else f"rank {self.rank}"
        exit_words = "" if self.exit_code is None else f", exit code {self.exit_code}"
        lines = [f"first cause: {who}{exit_words}: {self.code + ': ' if self.code else ''}{self.message}"]
        if self.log:
            lines.append(f"log: {self.log}")
        lines += [f"  | {line}" for line in self.tail]
        lines += [f"next: {self.next}"] if self.next else []
        lines += [f"runbook: {self.runbook}"] if self.runbook else []
        return lines


def first_cause(seen: Observation) -> Cause | None:
    """None if no rank and no launcher failed: then the gates alone tell what is wrong."""
    if seen.launch_error is not None:
        record = dict(seen.launch_error)
        return Cause(None, record["message"], record["code"], next=record["next"], runbook=runbook_of(record))
    outcome = seen.outcome
    errors = any(report.get("error") for report in seen.reports.values())
    if outcome is None or (outcome.returncode == 0 and not outcome.timed_out and not errors):
        return None
    left = gather(seen.run_dir)
    found = judge(left)
    proved = bool(found.triggers or found.parties) and found.verdict is Verdict.FAIL
    if outcome.timed_out and (not proved or _cut(left, found)):
        return _of_deadline(seen)
    if found.verdict is Verdict.FAIL or found.speaker is not None:
        return _of_triage(seen, left, found)
    log = seen.run_dir / LAUNCHER_LOG
    return Cause(
        None,
        f"the launcher ended with {outcome.returncode} and no rank said why",
        exit_code=outcome.returncode,
        log=str(log),
        tail=tail(log),
        next="tpctl bringup --level 1",
    )


def _cut(left: Seen, found: Triage) -> bool:
    """Whether the ranks died of the deadline alone: the launcher ended them, and they were silent till then."""
    return found.kind == Kind.LOST and left.first_dead is None


def _of_triage(seen: Observation, left: Seen, found: Triage) -> Cause:
    """Of a difference no rank is the cause; of victims alone, the one that speaks."""
    rank = found.triggers[0] if len(found.triggers) == 1 else None
    if rank is None and not found.parties:
        rank = found.speaker
    one = left.of(rank) if rank is not None else None
    log = rank_log(seen.run_dir, rank) if rank is not None else None
    record: Mapping[str, Any] = {"fm": found.fm, "code": found.code}
    quoted = one.report.error if one is not None and one.report is not None else None
    message = str(quoted["message"]) if quoted and rank == found.speaker else found.sentence
    return Cause(
        rank,
        message,
        found.code,
        one.exit_code if one is not None else None,
        found.fm,
        str(log) if log else None,
        tail(log),
        f"tpctl triage {seen.run_dir}",
        runbook_of(dict(record)),
    )


def _of_deadline(seen: Observation) -> Cause:
    """Whoever is furthest behind: no report at all, then the fewest chunks."""
    ranks = range(seen.case.tp)
    rank = min(ranks, key=lambda r: (r in seen.reports, len(seen.reports.get(r, {}).get("chunks", []))))
    log = rank_log(seen.run_dir, rank)
    state = seen.reports.get(rank, {}).get("state", "no report yet")
    return Cause(
        rank,
        f"the deadline of {seen.case.deadline_s:g} s passed; this rank is furthest behind ({state})",
        log=str(log) if log else None,
        tail=tail(log),
        next=f"tpctl bringup --case {seen.case.id}",
    )
