"""Ranks of all hosts in one snapshot, and when a verdict over several hosts holds. Pure, but for what `Caution` keeps.

Looks of two hosts are not taken at one instant, and their clocks are not compared. Three kinds of verdict follow:

*Facts.* What a rank entered at a place, that it finished, ended or died: none of it is ever undone, so it holds in any
cut. A difference between hosts needs nothing else.

*Waiting for each other.* The judge's proof of a deadlock uses no instant either: it needs of each rank that it was seen
inside its collective, and its counts read after that, in one look; when the looks of different ranks were taken does
not enter. Yet such verdicts, and those that name who never came, rest on a remote look being recent. So they are
confirmed only when each host they speak of has looked again *after* this host saw its own part: every summary says
which look of each other host was known before it was taken. If the local ranks are then still inside the collectives
in which they were seen first, that remote look fell within the time during which they were inside without a break.

*Another host's cause.* A rank that died, was stopped or ended itself is best described by the referee beside it, so
that one speaks first. Only if it does not, others say what its summary shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from engine.blackbox import Collective
from engine.referee import words
from engine.referee.judge import VICTIMS, WAITED, Kind, Verdict, needed
from engine.referee.snapshot import Life, Seat, Snapshot
from engine.referee.summary import Summary, to_clock

# What other hosts get to tell their part before a cause, or a majority, is taken to be missing.
SETTLE_NS = 1_000_000_000
MAJORITY_NS = 500_000_000
# How long the referee beside a rank gets to name it before another does.
SPEAK_NS = 500_000_000
# How much of a wait that failed must have been silent, and how much silence is more than a slow store.
MOST_OF = 0.8
PARTED_NS = 500_000_000
WAITING = frozenset({Kind.DEADLOCK, Kind.LEFT, Kind.LATE})
OWN_WORD = frozenset({Kind.LOST, Kind.FROZEN, Kind.ENDED})


@dataclass(frozen=True)
class Remote:
    """Another host as it is known here: its newest summary, the offset from its clock to ours, how long it is quiet.

    `quiet_ns` counts only time in which the store answered and held nothing new, or refused to be reached: a store
    that is slow to answer makes nobody quiet.
    """

    slot: int
    summary: Summary
    offset_ns: int
    quiet_ns: int = 0


def join(local: Snapshot, remotes: Iterable[Remote]) -> Snapshot:
    """Local ranks and those of other hosts. A host that claims a rank that is taken is left out."""
    seats = dict(local.seats)
    expected = list(local.expected)
    others = [remote for remote in remotes if not local.seats.keys() & set(remote.summary.ranks)]
    for remote in others:
        if not seats.keys() & set(remote.summary.ranks):
            seats |= {seat.rank: to_clock(seat, remote.offset_ns) for seat in remote.summary.seats}
            expected += [rank for rank in remote.summary.ranks if rank not in expected]
    return replace(
        local,
        expected=tuple(sorted(expected)),
        seats=dict(sorted(seats.items())),
        # While no other host was seen, at least one is still to come.
        to_find=local.to_find + (0 if others else 1),
        settle_ns=SETTLE_NS,
        majority_ns=MAJORITY_NS,
    )


class Caution:
    """Says when a verdict is certain enough. The same one must be seen in two looks, and what it rests on must hold."""

    def __init__(self, slot: int | None = None) -> None:
        self.slot = slot  # ours, once there is one
        self.times = 0
        self._key: object = None
        self._look = 0
        self._since_ns = 0

    @property
    def pending(self) -> bool:
        """A verdict was seen, and is not certain yet."""
        return self._key is not None

    def allows(self, verdict: Verdict | None, local: Snapshot, look: int, remotes: Iterable[Remote]) -> bool:
        key = self._key_of(verdict, local)
        if key != self._key:
            self._key, self._look, self._since_ns, self.times = key, look, local.t_ns, 0
        self.times += 1
        if verdict is None or self.times < 2:
            return False
        named = {*verdict.triggers, *verdict.victims}
        far = [remote for remote in remotes if named & set(remote.summary.ranks)]
        if verdict.kind in WAITING:
            return all(self._has_looked_since(remote.summary) for remote in far)
        if verdict.kind in OWN_WORD and far and verdict.triggers and not set(verdict.triggers) & local.seats.keys():
            return local.t_ns - self._since_ns >= SPEAK_NS
        return True

    def _key_of(self, verdict: Verdict | None, local: Snapshot) -> object:
        if verdict is None:
            return None
        inside = tuple(
            (rank, seat.inside.seq) for rank, seat in local.seats.items() if seat.inside and verdict.kind in WAITING
        )
        return verdict.kind, verdict.triggers, verdict.fm, inside

    def _has_looked_since(self, summary: Summary) -> bool:
        if summary.over:
            return True  # what is over stays as it is
        return self.slot is not None and (summary.seen or {}).get(self.slot, 0) >= self._look


class Waits:
    """How long each local rank has been inside the collective it is in."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[int, int]] = {}

    def note(self, local: Snapshot, slept: bool) -> None:
        """`slept`: the referee was stopped for a while, so what it saw before says nothing about the time between."""
        for rank, seat in local.seats.items():
            seq = seat.inside.seq if seat.inside is not None else 0
            if slept or self._since.get(rank, (0, 0))[0] != seq:
                self._since[rank] = (seq, local.t_ns)

    def lasting(self, local: Snapshot, budget_ns: int) -> list[Seat]:
        """Living ranks inside one collective for longer than the budget."""
        return [
            seat
            for rank, seat in local.seats.items()
            if seat.inside is not None and seat.life is Life.ALIVE and local.t_ns - self._since[rank][1] >= budget_ns
        ]


def silence(
    local: Snapshot, joint: Snapshot, remotes: Iterable[Remote], waits: Waits, budget_ns: int
) -> Verdict | None:
    """A local rank waits, since the budget began, for a rank of a host that has said nothing since then.

    A host that is quiet while the job goes on has lost its referee at most, and one that left is not quiet.
    """
    quiet = [remote for remote in remotes if remote.quiet_ns >= budget_ns and not remote.summary.leaving]
    if not quiet:
        return None
    lasting = waits.lasting(local, budget_ns)
    found: dict[int, tuple[Remote, Seat, set[int]]] = {}
    for remote in quiet:
        for seat in lasting:
            absent = needed(seat, seat.inside, joint) & set(remote.summary.ranks)
            if absent:
                found.setdefault(remote.slot, (remote, seat, absent))
    if not found:
        return None
    silent = sorted(found.values(), key=lambda each: -each[0].quiet_ns)
    triggers = tuple(sorted(silent[0][2])) if len(silent) == 1 else ()
    return Verdict(
        Kind.LOST,
        "FM-40",
        triggers,
        tuple(rank for rank in local.seats if rank not in triggers),
        "; ".join(_silent(*each) for each in silent),
        local.t_ns,
    )


def _silent(remote: Remote, seat: Seat, absent: set[int]) -> str:
    entry: Collective | None = seat.inside
    where = words.waits(seat.rank, entry) if entry is not None else f"rank {seat.rank} waits"
    return (
        f"host {remote.summary.host} fell silent {remote.quiet_ns / 1e9:.1f} s ago, and {where}, "
        f"for {words.rank_list(sorted(absent))} of it"
    )


def parted(local: Snapshot, remotes: Iterable[Remote], unanswered_ns: int, endpoint: str) -> Verdict | None:
    """A local rank ended by its own deadline, and for most of that wait nothing came from another host.

    The link is lost, or the host: from here they look alike, so no rank is blamed.

    Args:
        unanswered_ns: since when the job's store has not answered this host.
        endpoint: that store.
    """
    ended = [seat for seat in local.seats.values() if seat.life is Life.GONE or seat.ending is not None]
    codes = {seat.ending.exit_code if seat.ending is not None else None for seat in ended}
    # A send whose budget is over ends as a lost transport, a wait as an orphan: both name the budget.
    waited = [seat for seat in ended if _budget_s(seat)]
    if not waited or not codes <= WAITED | VICTIMS:
        return None
    seat = min(waited, key=lambda each: each.ended_ns)
    budget_s = _budget_s(seat)
    since_ns = max(int(MOST_OF * budget_s * 1e9), PARTED_NS) + local.t_ns - seat.ended_ns
    quiet = [remote for remote in remotes if remote.quiet_ns >= since_ns and not remote.summary.leaving]
    if unanswered_ns >= since_ns:
        what = f"the job's store at {endpoint} has not answered for {unanswered_ns / 1e9:.1f} s"
    elif quiet:
        what = "; ".join(f"host {each.summary.host} has said nothing for {each.quiet_ns / 1e9:.1f} s" for each in quiet)
    else:
        return None
    message = seat.ending.message if seat.ending is not None else ""
    return Verdict(
        Kind.LOST,
        "FM-40",
        (),
        tuple(local.seats),
        f"{what}: the link is lost, or that host; here {message}",
        seat.ended_ns,
    )


def _budget_s(seat: Seat) -> float:
    """The budget that a rank says it ended by; 0 if it ended otherwise."""
    error = (seat.ending.error if seat.ending is not None else None) or {}
    budget = (error.get("evidence") or {}).get("budget_s", 0.0)
    return float(budget) if isinstance(budget, int | float) else 0.0


def seen(remotes: Iterable[Remote]) -> Mapping[int, int]:
    """What a look that begins now may claim to know."""
    return {remote.slot: remote.summary.look for remote in remotes}
