"""Triage: one observation of a run in, who began it out. Pure; the trigger stands apart from the victims.

The order of evidence: the referee's record, which was made from outside while the ranks lived; a rank killed by a
signal; a rank that reports a fault of its own; then the ranks that only waited. Ids order the acts, never clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.lifecycle import RankExit
from tpctl.verdict import Coverage, Verdict

FAILURE_MODES: dict[str, tuple[str, str]] = {
    "FM-01": ("plan or role mismatch", "plan-mismatch"),
    "FM-02": ("call-count mismatch", "call-count-mismatch"),
    "FM-03": ("conditional collective", "parity-mismatch"),
    "FM-04": ("throw after header", "throw-after-header"),
    "FM-06": ("missing override, fallback", "missing-override"),
    "FM-07": ("unsupported dtype found late", "unsupported-dtype"),
    "FM-08": ("ad-hoc broadcast", "ad-hoc-broadcast"),
    "FM-10": ("stale epoch or cache reset drift", "stale-epoch"),
    "FM-15": ("stale override reused", "stale-override"),
    "FM-17": ("stale conditioning", "stale-conditioning"),
    "FM-22": ("wrong group", "wrong-group"),
    "FM-23": ("leader failed before its broadcast", "leader-failed"),
    "FM-30": ("input drift", "input-drift"),
    "FM-31": ("weight drift", "weight-drift"),
    "FM-32": ("cache lifecycle drift", "cache-drift"),
    "FM-40": ("peer lost", "peer-lost"),
    "FM-41": ("peer frozen", "peer-frozen"),
    "FM-50": ("compile asymmetry", "compile-asymmetry"),
    "FM-51": ("graph break", "graph-break"),
}
# Ranks that ended so were left alone by another, unless nobody else did anything.
VICTIMS = frozenset({RankExit.PEER_ERROR, RankExit.TRANSPORT, RankExit.ORPHANED, RankExit.PHASE_BUDGET})


@dataclass(frozen=True)
class RankSeen:
    """What one rank left. `exit_code` is negative for a signal; `place` is its last commitment or collective.

    `ids` are (call_id, commitments so far) of its last act: how far it came, in the job's own time.
    """

    rank: int
    exit_code: int | None = None
    state: str | None = None
    error: Mapping[str, Any] | None = None
    place: str | None = None
    ids: tuple[int, int] = (-1, 0)


@dataclass(frozen=True)
class Seen:
    """A run as it lies there. `referee` is RUN/referee.json; `problems` are files that could not be read."""

    ranks: tuple[RankSeen, ...]
    expected_ranks: int
    referee: Mapping[str, Any] | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Triage:
    """`trigger` is empty where only a difference, or nothing, is proved."""

    verdict: Verdict
    sentence: str
    trigger: tuple[int, ...] = ()
    victims: tuple[int, ...] = ()
    fm: str | None = None
    coverage: Coverage = field(default_factory=lambda: Coverage(0, 0))

    @property
    def words(self) -> str | None:
        return FAILURE_MODES[self.fm][0] if self.fm in FAILURE_MODES else None

    @property
    def runbook(self) -> str | None:
        return FAILURE_MODES[self.fm][1] if self.fm in FAILURE_MODES else None


def judge(seen: Seen) -> Triage:
    """Who began it, of what, and who only suffered."""
    told = [rank for rank in seen.ranks if rank.exit_code is not None]
    coverage = Coverage(len(told), max(seen.expected_ranks, len(seen.ranks)))

    def say(sentence: str, trigger: tuple[int, ...] = (), fm: str | None = None) -> Triage:
        others = (rank.rank for rank in seen.ranks if rank.rank not in trigger and rank.exit_code != 0)
        return Triage(Verdict.FAIL, sentence, trigger, tuple(others), fm, coverage)

    culprits = seen.referee.get("culprits") if seen.referee else None
    if seen.referee and isinstance(culprits, list) and seen.referee.get("message"):
        return say(str(seen.referee["message"]), tuple(map(int, culprits)), seen.referee.get("fm"))
    killed = [rank for rank in told if (rank.exit_code or 0) < 0 and rank.exit_code != -15]
    own = [rank for rank in told if rank.error and rank.exit_code not in VICTIMS]
    if own:
        # The same tripwire fires on all ranks at once: the record itself names whom a majority convicts.
        first = min(own, key=lambda rank: (rank.ids, rank.rank))
        record = first.error or {}
        odd = record.get("evidence", {}).get("minority") or record.get("evidence", {}).get("ranks")
        trigger = tuple(int(rank) for rank in odd) if odd else ((first.rank,) if len(own) == 1 else ())
        return say(f"{record.get('code')}: {record.get('message')}", trigger, record.get("fm"))
    if killed:
        names = ", ".join(f"rank {rank.rank} by signal {-(rank.exit_code or 0)}" for rank in killed)
        return say(f"killed: {names}", tuple(rank.rank for rank in killed), "FM-40")
    silent = [rank for rank in seen.ranks if rank.exit_code is None]
    bereft = [rank for rank in told if rank.exit_code in VICTIMS]
    if bereft and silent:
        last = ", ".join(f"rank {rank.rank} in {rank.place or 'no known place'}" for rank in silent)
        frozen = any(rank.exit_code in (RankExit.PHASE_BUDGET, RankExit.ORPHANED) for rank in bereft)
        how = "did not answer" if frozen else "were gone"
        fm = "FM-41" if frozen and not any(rank.exit_code == RankExit.TRANSPORT for rank in bereft) else "FM-40"
        return say(f"{how}, and wrote nothing of their end: {last}", tuple(rank.rank for rank in silent), fm)
    if bereft:
        return say("every rank says it waited for another; no record proves who began it", (), "FM-40")
    if not told or coverage.checked < coverage.expected or seen.problems:
        return Triage(Verdict.UNKNOWN, "not every rank left a record of its end", coverage=coverage)
    if all(rank.exit_code == 0 for rank in told):
        return Triage(Verdict.PASS, "nothing is wrong: every rank drained and left with 0", coverage=coverage)
    return say("ranks ended without saying why", tuple(r.rank for r in told if r.exit_code), None)
