"""The first cause of a failed case: which rank, why, where its log is, what to type next. Victims are not causes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.lifecycle import RankExit
from tpctl.errors import runbook_of
from tpctl.launch.referee import VERDICT
from tpctl.matrix.observation import Observation

# These ranks died of another one's death, unless nobody else died.
VICTIMS = frozenset({int(RankExit.PEER_ERROR), int(RankExit.TRANSPORT)})
# These wait for somebody in vain: victims too, if a rank was killed.
BEREFT = frozenset({int(RankExit.ORPHANED), int(RankExit.PHASE_BUDGET)})
REFEREE = ("tpctl.referee", 1)
TAIL_LINES = 10
TAIL_BYTES = 16384


@dataclass(frozen=True)
class Cause:
    """Why a case failed. `rank` is None where the launcher itself is to blame."""

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
    if seen.outcome is None or (seen.outcome.returncode == 0 and not seen.outcome.timed_out and not _errors(seen)):
        return None
    errors = _errors(seen)
    verdict = read_verdict(seen.run_dir)
    if verdict is not None and not seen.outcome.timed_out:
        triggers = verdict["triggers"]
        if verdict["kind"] != "ended":
            return _of_verdict(seen, verdict)
        if len(triggers) == 1 and triggers[0] in errors:
            return _of_report(seen, triggers[0])
    deaths = launcher_failures(seen.run_dir / "launcher.log")
    # A killed rank writes no report. `deaths` starts with the root cause; SIGTERM is the launcher tidying up.
    silent = [rank for rank in deaths if rank not in errors]
    killed = [rank for rank in silent if deaths[rank] != -signal.SIGTERM] or ([] if errors else silent)
    victims = VICTIMS | BEREFT if killed and deaths[killed[0]] < 0 else VICTIMS
    culprits = {rank: report for rank, report in errors.items() if report["error"].get("exit_code") not in victims}
    if culprits:
        return _of_report(seen, min(culprits, key=lambda rank: _when(culprits[rank])))
    if killed:
        return _of_death(seen, killed[0], deaths[killed[0]])
    if seen.outcome.timed_out:
        return _of_deadline(seen)
    if errors:
        return _of_report(seen, min(errors, key=lambda rank: _when(errors[rank])))
    log = seen.run_dir / "launcher.log"
    return Cause(
        None,
        f"the launcher ended with {seen.outcome.returncode} and no rank said why",
        exit_code=seen.outcome.returncode,
        log=str(log),
        tail=tail(log),
        next="tpctl bringup --level 1",
    )


def read_verdict(run_dir: Path) -> dict[str, Any] | None:
    """The referee's verdict, or None if there is none, or none that can be read."""
    try:
        data = json.loads((run_dir / VERDICT).read_text(encoding="utf-8"))
        verdict = data["verdict"]
        known = (data["schema"], data["schema_version"]) == REFEREE and isinstance(verdict["message"], str)
        return verdict if known and isinstance(verdict["triggers"], list) and verdict["kind"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_verdict(seen: Observation, verdict: Mapping[str, Any]) -> Cause:
    """What the referee proved from outside. `rank` is None where it convicts nobody, or several."""
    rank = verdict["triggers"][0] if len(verdict["triggers"]) == 1 else None
    log = rank_log(seen.run_dir, rank) if rank is not None else None
    deaths = launcher_failures(seen.run_dir / "launcher.log")
    return Cause(
        rank,
        verdict["message"],
        exit_code=deaths.get(rank) if rank is not None else None,
        fm=verdict.get("fm"),
        log=str(log) if log else None,
        tail=tail(log),
        next=f"tpctl triage {seen.run_dir}",
        runbook=runbook_of(dict(verdict)),
    )


def _errors(seen: Observation) -> dict[int, Mapping[str, Any]]:
    return {rank: report for rank, report in seen.reports.items() if report.get("error")}


def _when(report: Mapping[str, Any]) -> float:
    return float(report.get("written_at", 0.0))


def _of_report(seen: Observation, rank: int) -> Cause:
    record = seen.reports[rank]["error"]
    log = rank_log(seen.run_dir, rank)
    return Cause(
        rank,
        record["message"],
        record["code"],
        record.get("exit_code"),
        record.get("fm"),
        str(log) if log else None,
        tail(log),
        record.get("next"),
        runbook_of(record),
    )


def _of_death(seen: Observation, rank: int, exit_code: int) -> Cause:
    log = rank_log(seen.run_dir, rank)
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with {exit_code}"
    return Cause(
        rank,
        f"{how}, without a report",
        exit_code=exit_code,
        fm="FM-40" if exit_code < 0 else None,
        log=str(log) if log else None,
        tail=tail(log),
        next="tpctl env",
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


def launcher_failures(log: Path) -> dict[int, int]:
    """Exit code by rank, as torchrun's summary in its log lists them; the root cause first."""
    text = _text(log)
    pairs = [
        (match.start(), int(match[1]), int(match[2]))
        for match in re.finditer(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", text)
    ]
    root = text.find("Root Cause")
    pairs.sort(key=lambda pair: (pair[0] < root, pair[0]))
    return {rank: code for _, rank, code in pairs}


def rank_log(run_dir: Path, rank: int) -> Path | None:
    """The stderr of a rank of this host, of its last attempt."""
    found = sorted((run_dir / "logs").glob(f"*/attempt_*/{rank}/stderr.log"))
    return found[-1] if found else None


def tail(log: Path | None) -> tuple[str, ...]:
    """The last lines that say something."""
    lines = [line.rstrip() for line in _text(log).splitlines() if line.strip()] if log else []
    return tuple(lines[-TAIL_LINES:])


def _text(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
