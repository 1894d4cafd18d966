"""Triage: what a run left in, who began it out. Pure; the trigger stands apart from the victims.

The evidence in its order: the referee's record, made from outside while the ranks lived; the ledgers of all ranks,
compared place by place; a rank that reports a fault of its own; a rank that is gone without a word; ranks that only
waited. Acts are ordered by ids, never by clocks. Blame needs proof: a strict majority or a sole absentee; two ranks
that differ are a difference, and the sentence says what each did. `engine.referee.judge` judges, here as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.referee import words
from engine.referee.judge import TOLD, Kind, odd_ones
from engine.referee.judge import judge as judge_snapshot
from engine.referee.snapshot import Snapshot
from tpctl.evidence import RankSeen, Seen
from tpctl.failuremodes import LINK_LOST, fm_of, runbook_id, words_of
from tpctl.rewind import error_code, held_on, snapshot, standing, waited
from tpctl.verdict import Coverage, Verdict

REFUSED_FRAME = "TP-22"


@dataclass(frozen=True)
class Triage:
    """`triggers` is empty where only a difference, or nothing, is proved; `parties` are the ranks that differ.

    `kind` is the referee's word for it, or told, unknown, running, drained. `speaker` is the rank whose own report the
    sentence quotes; `code` is the code of that report.
    """

    verdict: Verdict
    kind: str
    sentence: str
    triggers: tuple[int, ...] = ()
    parties: tuple[int, ...] = ()
    victims: tuple[int, ...] = ()
    fm: str | None = None
    code: str | None = None
    speaker: int | None = None
    source: str = "ranks"
    coverage: Coverage = field(default_factory=lambda: Coverage(0, 0))

    @property
    def words(self) -> str | None:
        return words_of(self.fm)

    @property
    def runbook(self) -> str | None:
        if self.kind == Kind.LOST and self.source == "referee" and not self.triggers:
            return LINK_LOST  # nobody is proved dead: the link, or the host behind it
        return runbook_id(self.fm, self.code)

    @property
    def blame(self) -> str:
        return "rank" if self.triggers else "difference" if self.parties else "nobody"

    def role(self, rank: int) -> str:
        named = {"trigger": self.triggers, "differs": self.parties, "victim": self.victims}
        return next((role for role, ranks in named.items() if rank in ranks), "-")


def judge(seen: Seen) -> Triage:
    """Who began it, of what, and who only suffered."""
    found = _judge(seen)
    coverage = Coverage(sum(rank.known for rank in seen.ranks), len(seen.ranks))
    suffered = (r.rank for r in seen.ranks if (r.ended not in (0, None) and error_code(r) != TOLD) or r.silent)
    blamed = {*found.triggers, *found.parties}
    victims = {*found.victims, *suffered} if found.verdict is Verdict.FAIL else set(found.victims)
    return replace(found, coverage=coverage, victims=tuple(sorted(victims - blamed)))


def _judge(seen: Seen) -> Triage:
    own = sorted((rank for rank in seen.ranks if _own_fault(rank)), key=standing)
    alone = [rank for rank in own if _local_fault(rank)]
    if seen.referee is not None and seen.referee.kind != Kind.ENDED:
        said = seen.referee
        if first := _before(said.kind, {*said.triggers} or {*said.victims}, alone):
            return _of_report(seen, first)
        parties = () if said.triggers else said.victims
        fm = said.fm
        return Triage(Verdict.FAIL, said.kind, said.message, said.triggers, parties, said.victims, fm, source="referee")
    told = [rank for rank in seen.ranks if error_code(rank) == TOLD]
    if told and not own:
        quoted = (told[0].report.error or {}) if told[0].report else {}
        who = words.rank_list([rank.rank for rank in told])
        return Triage(
            Verdict.FAIL, "told", f"nobody's fault: {who} was told to leave: {quoted.get('message')}", code=TOLD
        )
    before = judge_snapshot(snapshot(seen, rewound=True))
    if before is not None and before.kind in (Kind.MISMATCH, Kind.DEADLOCK, Kind.LEFT, Kind.FROZEN):
        if first := _before(before.kind, {*before.triggers} or {*before.victims}, alone):
            return _of_report(seen, first)
        return _of_proof(seen, before)
    if own:
        return _of_report(seen, own)
    if seen.referee is not None:
        said = seen.referee
        if not any(rank.ended for rank in seen.ranks):  # their own words are lost: the referee's stand
            return Triage(Verdict.FAIL, said.kind, said.message, said.triggers, (), said.victims, said.fm)
    after = judge_snapshot(snapshot(seen, rewound=False))
    if after is not None and after.kind is Kind.LOST:
        return _of_lost(seen)
    if after is not None and after.kind is Kind.LATE and after.triggers:
        return _of_proof(seen, after)
    if after is not None and after.kind is Kind.LEFT:
        return _of_proof(seen, after)
    return _of_waiters(seen)


def _own_fault(rank: RankSeen) -> bool:
    """It ended by a fault that it names as its own."""
    return standing(rank)[0] == 0


def _local_fault(rank: RankSeen) -> bool:
    """A fault that no other rank had a part in: neither a comparison over the ranks nor a frame that came."""
    error = (rank.report.error or {}) if rank.report else {}
    return not error.get("evidence") and not error_code(rank).startswith(REFUSED_FRAME)


def _before(kind: str, accused: set[int], alone: Sequence[RankSeen]) -> list[RankSeen]:
    """Ranks whose own fault comes before what the ledgers show: on its way out a rank may still enter a collective."""
    if kind not in (Kind.MISMATCH, Kind.DEADLOCK, Kind.LEFT):
        return []
    return [rank for rank in alone if rank.rank in accused]


def _of_proof(seen: Seen, verdict: Any) -> Triage:
    """What the ledgers prove. A rank without a black box cannot be shown to be away."""
    triggers = verdict.triggers
    if any((rank := seen.of(r)) is None or rank.contents is None for r in triggers):
        triggers = ()
    parties = () if triggers else verdict.victims
    return Triage(Verdict.FAIL, verdict.kind.value, verdict.message, triggers, parties, verdict.victims, verdict.fm)


def _of_report(seen: Seen, own: Sequence[RankSeen]) -> Triage:
    """The ranks' own words. A check that all make alike convicts whom a majority convicts, not who says so."""
    speaker = own[0]
    error = dict(speaker.report.error or {}) if speaker.report else {}
    code, message = str(error.get("code")), str(error.get("message"))
    fm, evidence = fm_of(error), error.get("evidence") or {}
    found = Triage(Verdict.FAIL, Kind.ENDED.value, message, fm=fm, code=code, speaker=speaker.rank)
    if code.startswith(REFUSED_FRAME):
        return _of_refusal(seen, found, [rank for rank in own if error_code(rank).startswith(REFUSED_FRAME)])
    table = _values(evidence)
    minority = [rank for rank in evidence.get("minority", ()) if seen.of(rank)]
    if minority:
        return replace(found, triggers=tuple(minority))
    if table:
        odd = odd_ones(table, len(table))
        return replace(found, triggers=odd, parties=() if odd else tuple(sorted(table)))
    return replace(found, triggers=(speaker.rank,))


def _values(evidence: Mapping[str, Any]) -> dict[int, str]:
    """The first difference by rank, as the check that failed wrote it down."""
    table: Mapping[str, Any] = evidence.get("by_rank") or next(iter((evidence.get("differences") or {}).values()), {})
    return {int(rank): str(value) for rank, value in table.items()}


def _of_refusal(seen: Seen, found: Triage, refused: Sequence[RankSeen]) -> Triage:
    """A frame came that must not be accepted. Its sender or its receiver is wrong: only other receivers can tell."""
    name = _link(refused[0])
    group = next((g for g in _groups(refused[0]) if g.name == name), None)
    sender = group.leader if group else 0
    members = group.ranks if group else (sender, refused[0].rank)
    place = _count(refused[0], name)
    accepted = [
        rank
        for rank in seen.ranks
        if rank.rank in members and rank.rank != sender and rank not in refused and _count(rank, name) > place
    ]
    ranks = tuple(rank.rank for rank in refused)
    sentence = f"{words.rank_list(ranks)} refused what rank {sender} sent: {found.sentence}"
    receivers = len(members) - 1
    if len(ranks) > 1 and 2 * len(ranks) > receivers:
        return replace(found, sentence=sentence, triggers=(sender,))
    if len(accepted) > 1 and 2 * len(accepted) > receivers:
        return replace(found, sentence=sentence, triggers=ranks)
    return replace(found, sentence=sentence, parties=tuple(sorted({sender, *ranks})))


def _groups(rank: RankSeen) -> tuple[Any, ...]:
    return rank.contents.groups if rank.contents else ()


def _link(rank: RankSeen) -> str:
    """The group that the frame came through: the last one that the rank was in, of those in which another one sends.

    A mesh leader in pp says ERROR to its mesh before it leaves.
    """
    leaders = {group.name: group.leader for group in _groups(rank)}
    entered = reversed(rank.contents.collectives) if rank.contents else ()
    return next((entry.group for entry in entered if leaders.get(entry.group) != rank.rank), "mesh_pg")


def _count(rank: RankSeen, name: str) -> int:
    """Collectives that it entered in a group."""
    counts = rank.contents.live.counts if rank.contents else ()
    return next((n for group, n in zip(_groups(rank), counts, strict=True) if group.name == name), 0)


def _of_lost(seen: Seen) -> Triage:
    """Gone without a word. Of several, only the launcher can have seen which was the first."""
    silent = [rank for rank in seen.ranks if rank.silent]
    first = seen.of(seen.first_dead) if seen.first_dead is not None else None
    if first is not None and first.silent:
        silent = [first]
    view = snapshot(seen, rewound=False)
    what = "; ".join(_death(rank, view) for rank in silent)
    unread = [rank.rank for rank in seen.ranks if rank.problems]
    found = Triage(Verdict.FAIL, Kind.LOST.value, what, fm="FM-40")
    if unread or seen.referee_lost:
        away = "the referee's record cannot be read, and it may have ended them"
        if unread:
            away = f"what {words.rank_list(unread)} did cannot be read, so that it is not proved to be the first"
        parties = tuple(rank.rank for rank in silent)
        return replace(found, verdict=Verdict.UNKNOWN, sentence=f"{what}; but {away}", parties=parties)
    if len(silent) == 1:
        return replace(found, triggers=(silent[0].rank,))
    return replace(
        found, sentence=f"{what}; nothing tells which was the first", parties=tuple(rank.rank for rank in silent)
    )


def _death(rank: RankSeen, view: Snapshot) -> str:
    status = rank.status
    how = "is gone"
    if status is not None:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
    was = words.was(view.seats[rank.rank]).removeprefix(f"rank {rank.rank} ") if rank.contents else "left no black box"
    return f"rank {rank.rank} {how}, without a report: it {was}"


def _of_waiters(seen: Seen) -> Triage:
    """No proof in the ledgers, and nobody names a fault of its own."""
    silent = [rank for rank in seen.ranks if rank.silent]
    unread = [rank for rank in seen.ranks if rank.problems]
    ended = sorted((rank for rank in seen.ranks if rank.ended), key=standing)
    waiters = [rank for rank in ended if waited(rank)]
    view = snapshot(seen, rewound=True)
    if ended and (unread or (seen.referee_lost and silent)):
        what = "the referee's record cannot be read, and it may have ended those that are silent"
        if unread:
            what = f"{words.rank_list([rank.rank for rank in unread])} cannot be read, and the others only suffered"
        return _quoting(ended[0], Triage(Verdict.UNKNOWN, "unknown", what))
    if waiters and len(silent) == 1 and held_on(seen):
        gone = silent[0]
        who = (
            f"{words.rank_list([rank.rank for rank in waiters])} waited until {'its' if len(waiters) == 1 else 'their'}"
        )
        sentence = f"{who} deadline for rank {gone.rank}: {words.was(view.seats[gone.rank])}"
        return Triage(Verdict.FAIL, Kind.LATE.value, sentence, (gone.rank,), fm="FM-41")
    if ended:
        first = ended[0]
        what = "every rank that ended says it suffered from another; nothing proves who began it"
        return _quoting(first, Triage(Verdict.FAIL, Kind.ENDED.value, what))
    if seen.alive:
        return _of_living(seen)
    if seen.problems or unread or not seen.ranks:
        what = "the referee ended this job, and its record cannot be read" if seen.referee_lost else ""
        what = what or "not every rank left a readable record of its end"
        return Triage(Verdict.UNKNOWN, "unknown", what)
    if silent:
        where = "; ".join(words.was(view.seats[rank.rank]) if rank.contents else "" for rank in silent)
        ranks = tuple(rank.rank for rank in silent)
        what = f"{words.rank_list(ranks)} wrote nothing before the end, which came from outside"
        return Triage(Verdict.FAIL, Kind.LOST.value, f"{what}, and nothing proves why; {where}", parties=ranks)
    if any(rank.ended != 0 for rank in seen.ranks):
        return Triage(Verdict.UNKNOWN, "unknown", "nothing is proved, and not every rank drained")
    return Triage(Verdict.PASS, "drained", "nothing is wrong: every rank drained and left with 0")


def _quoting(rank: RankSeen, found: Triage) -> Triage:
    """With the words of a rank that is no culprit."""
    error = dict(rank.report.error or {}) if rank.report else {}
    said = f"{found.sentence}; rank {rank.rank} says: {error.get('message', f'exit code {rank.ended}')}"
    code = str(error["code"]) if error.get("code") else None
    return replace(found, sentence=said, fm=fm_of(error), code=code, speaker=rank.rank)


def _of_living(seen: Seen) -> Triage:
    alive = words.rank_list([rank.rank for rank in seen.ranks if rank.alive])
    rest = [rank.rank for rank in seen.ranks if not rank.alive]
    away = f"; {words.rank_list(rest)} not" if rest else ""
    what = f"the job still runs, and nothing is proved wrong so far: {alive} alive{away}"
    return Triage(Verdict.UNKNOWN, "running", what)
