"""From a snapshot to a verdict: a pure function, and the only place that blames.

The rules, first cause first. Blame needs proof: a strict majority, or a sole absentee. Two ranks that did different
things are a difference, and the verdict says what each did.

A deadlock is proved from a snapshot that was not taken at one instant. Let each rank of a set have been seen inside a
collective that waits for another rank of the set, whose count for that group was then read to be lower than the
waiter's place. The first rank of the set to come free would need its partner to enter that place after its count was
read; the partner was inside its own collective just before, so it would have come free earlier. Hence none ever does.
This needs `inside` to be read before the counts, and each rank to make its collectives one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.blackbox import Collective, Members
from engine.comm.group import ALLOWED, Phase
from engine.lifecycle import RankExit
from engine.referee import words
from engine.referee.snapshot import MAJORITY_NS, SETTLE_NS, Life, Seat, Snapshot

# Ended by another rank's end, or because they were told to: not a cause while there is any other.
VICTIMS = frozenset({int(RankExit.PEER_ERROR), int(RankExit.TRANSPORT)})
WAITED = frozenset({int(RankExit.ORPHANED), int(RankExit.PHASE_BUDGET)})
TOLD = "TP-6403"
MESSAGE = "message"
SIGTERM = 15
__all__ = ["MAJORITY_NS", "SETTLE_NS", "Kind", "Verdict", "judge", "needed", "odd_ones"]


class Kind(StrEnum):
    MISMATCH = "mismatch"  # different collectives at the same place
    DEADLOCK = "deadlock"  # ranks wait for each other in different groups
    LEFT = "left"  # a rank waits for one that has finished
    LOST = "lost"  # dead without a word
    FROZEN = "frozen"  # stopped
    LATE = "late"  # never came to where another waited until its own deadline
    ENDED = "ended"  # a rank ended itself and wrote down why


@dataclass(frozen=True)
class Verdict:
    """`triggers` are the ranks to blame; empty if it is a difference that convicts nobody. `message` is one sentence.

    `provable_ns` is when the last piece of the proof came to be.
    """

    kind: Kind
    fm: str | None
    triggers: tuple[int, ...]
    victims: tuple[int, ...]
    message: str
    provable_ns: int

    @property
    def blame(self) -> str:
        return "rank" if self.triggers else "difference"


def judge(snapshot: Snapshot) -> Verdict | None:
    """The first cause of what is wrong, or None: nothing is wrong, or nothing is proved yet."""
    return (
        _mismatch(snapshot) or _first_death(snapshot) or _frozen(snapshot) or _stuck(snapshot) or _aftermath(snapshot)
    )


def odd_ones(values: Mapping[int, Hashable], size: int) -> tuple[int, ...]:
    """Ranks outside a strict majority of `size`; empty when there is none."""
    ranked = Counter(values.values()).most_common(1)
    if not ranked or 2 * ranked[0][1] <= size:
        return ()
    return tuple(sorted(rank for rank, value in values.items() if value != ranked[0][0]))


def _mismatch(snapshot: Snapshot) -> Verdict | None:
    for difference in sorted(snapshot.differences, key=lambda d: min(e.t_ns for e in d.entered.values())):
        group, entered = difference.group, difference.entered
        triggers = odd_ones({rank: entry.hash_u64 for rank, entry in entered.items()}, len(group.ranks))
        provable_ns = max(entry.t_ns for entry in entered.values())
        to_come = [r for r in group.ranks if r not in entered and r in snapshot.seats and not snapshot.seats[r].left]
        if not triggers and to_come and snapshot.t_ns - provable_ns < snapshot.majority_ns:
            continue
        what = "; ".join(words.did(rank, entered[rank]) for rank in _first(entered, triggers))
        return Verdict(
            Kind.MISMATCH,
            "FM-03",
            triggers,
            _others(entered, triggers),
            f"ranks entered different collectives as number {difference.place} of {group.name}: {what}",
            provable_ns,
        )
    return None


def _first_death(snapshot: Snapshot) -> Verdict | None:
    """Killed without a word, or ended by an error of its own: whichever came first."""
    causes = [(seat.ended_ns, seat) for seat in snapshot.seats.values() if _is_cause(seat)]
    if not causes:
        return None
    _, seat = min(causes, key=lambda cause: cause[0])
    if _killed(seat):
        return _lost(snapshot, [other for _, other in causes if _killed(other)])
    return _ended(snapshot, seat)


def _is_cause(seat: Seat) -> bool:
    if _killed(seat):
        return seat.signal != SIGTERM
    return seat.ending is not None and seat.ending.exit_code not in VICTIMS | WAITED | {0} and not _told(seat)


def _frozen(snapshot: Snapshot) -> Verdict | None:
    stopped = [seat for seat in snapshot.seats.values() if seat.life is Life.STOPPED]
    if not stopped:
        return None
    ranks = tuple(seat.rank for seat in stopped)
    where = "; ".join(words.was(seat) for seat in stopped)
    return Verdict(
        Kind.FROZEN,
        "FM-41",
        ranks,
        _others(snapshot.seats, ranks),
        f"{words.rank_list(ranks)} {'is' if len(ranks) == 1 else 'are'} stopped: {where}",
        max(seat.changed_ns for seat in stopped),
    )


def _stuck(snapshot: Snapshot) -> Verdict | None:
    """Ranks that wait in a collective which can never complete."""
    waits = {rank: needed(seat, seat.inside, snapshot) for rank, seat in snapshot.seats.items() if _waits(seat)}
    finished = {rank for rank, seat in snapshot.seats.items() if seat.finished}
    stuck = set(waits)
    while True:
        free = {rank for rank in stuck if not waits[rank] & (stuck | finished)}
        if not free:
            break
        stuck -= free
    if not stuck:
        return None
    inside = {rank: entry for rank in sorted(stuck) if (entry := snapshot.seats[rank].inside) is not None}
    absent = sorted({other for rank in stuck for other in waits[rank] & finished})
    link = {rank: entry for rank, entry in inside.items() if entry.op == MESSAGE}
    if absent:
        first = {rank: entry for rank, entry in inside.items() if waits[rank] & finished}
        return _left(snapshot, first if link else inside, absent)
    if len(link) == 2:
        return _deadlock(snapshot, link)  # both ends: who else is stuck is so because of them
    # One end alone waits for the mesh, like whoever stands behind the ranks that wait for each other there.
    return _deadlock(snapshot, {rank: entry for rank, entry in inside.items() if rank not in link})


def needed(seat: Seat, entry: Collective | None, snapshot: Snapshot) -> set[int]:
    """Local ranks without which a rank's collective cannot complete, and which have not entered it.

    A broadcast is sure to need its leader only; the leader itself may be done as soon as its bytes are on the way.
    A message of a pp link needs both ends. One that was posted ahead, by a rank that goes on with other things, is no
    collective that it is inside of.
    """
    if entry is None or entry.group not in seat.groups:
        return set()
    group = seat.groups[entry.group]
    partners: Iterable[int] = group.ranks
    if entry.op == "broadcast":
        partners = () if seat.rank == group.leader else (group.leader,)
    return {
        other
        for other in partners
        if other != seat.rank
        and other in snapshot.seats
        and snapshot.seats[other].counts.get(entry.group, 0) < entry.place
    }


def _left(snapshot: Snapshot, inside: Mapping[int, Collective], absent: list[int]) -> Verdict:
    group = _group_of(snapshot, inside)
    # One that finished alone while a majority waits left too early; one that waits alone does what nobody else does.
    position = dict.fromkeys(inside, "waits") | dict.fromkeys(absent, "finished")
    triggers = odd_ones(position, len(group.ranks))
    what = "; ".join(words.waits(rank, entry) for rank, entry in inside.items())
    return Verdict(
        Kind.LEFT,
        "FM-03",
        triggers,
        _others(inside, triggers),
        f"{what}, but {words.rank_list(absent)} finished without entering it",
        max([entry.t_ns for entry in inside.values()] + [snapshot.seats[rank].ended_ns for rank in absent]),
    )


def _deadlock(snapshot: Snapshot, inside: Mapping[int, Collective]) -> Verdict:
    spots = {rank: (entry.group, entry.place, entry.hash_u64) for rank, entry in inside.items()}
    triggers = odd_ones(spots, len(inside))
    astray = tuple(rank for rank in inside if not _allowed(snapshot.seats[rank], inside[rank]))
    if astray and len(astray) < len(inside):
        triggers = astray  # the phase allows another group only, and the others are in it
    alike = len({(entry.op, entry.what) for entry in inside.values()}) == 1
    crossed = len({entry.group for entry in inside.values()}) > 1 and any(e.op != MESSAGE for e in inside.values())
    wrong_group = crossed and (alike or bool(astray))
    return Verdict(
        Kind.DEADLOCK,
        "FM-22" if wrong_group else "FM-03",
        triggers,
        _others(inside, triggers),
        "ranks wait for each other for ever: "
        + "; ".join(words.waits(rank, inside[rank]) for rank in _first(inside, triggers)),
        max(entry.t_ns for entry in inside.values()),
    )


def _aftermath(snapshot: Snapshot) -> Verdict | None:
    """Only victims' endings are known. Once the true cause had time to show, the earliest of them has to do."""
    ended = [
        seat
        for seat in snapshot.seats.values()
        if _killed(seat) or (seat.ending is not None and seat.ending.exit_code != 0)
    ]
    if not ended:
        return None
    seat = min(ended, key=lambda ended_seat: (_told(ended_seat), ended_seat.ended_ns))
    if _gave_up(seat):
        # The one that was late may have been the first to give up, by a hair: those that waited know of whom.
        for waiter in sorted(filter(_gave_up, ended), key=lambda gave_up: gave_up.ended_ns):
            if (late := _late(snapshot, waiter)) is not None:
                return late
    if seat.ending is not None and seat.ending.exit_code == RankExit.TRANSPORT and seat.last is not None:
        # The backend told it that a peer is gone. If that peer had drained, this is where they parted.
        absent = [rank for rank in needed(seat, seat.last, snapshot) if snapshot.seats[rank].finished]
        if absent:
            return _left(snapshot, {seat.rank: seat.last}, sorted(absent))
    if snapshot.all_gone:
        # All of them were told to leave: that is an order, not a failure.
        return None if _told(seat) else _ended(snapshot, seat)
    if snapshot.t_ns - min(other.ended_ns for other in ended) < snapshot.settle_ns:
        return None
    return _lost(snapshot, [seat]) if _killed(seat) else _ended(snapshot, seat)


def _late(snapshot: Snapshot, waiter: Seat) -> Verdict | None:
    """A rank waited until its own deadline. If it waited in a collective, who did not come is known."""
    absent = sorted(needed(waiter, waiter.inside, snapshot))
    if waiter.inside is None or not absent:
        return None
    # With several away, only where they are tells them apart: one that waits elsewhere is no culprit.
    busy = [rank for rank in absent if not _waits(snapshot.seats[rank])]
    triggers = tuple(busy) if len(busy) == 1 else tuple(absent) if len(absent) == 1 else ()
    away = "; ".join(words.was(snapshot.seats[rank]) for rank in triggers or absent)
    return Verdict(
        Kind.LATE,
        "FM-41",
        triggers,
        _others(snapshot.seats, triggers),
        f"{words.waits(waiter.rank, waiter.inside)} until its deadline; {words.rank_list(absent)} never came: {away}",
        waiter.ended_ns,
    )


def _lost(snapshot: Snapshot, dead: list[Seat]) -> Verdict:
    ranks = tuple(sorted(seat.rank for seat in dead))
    return Verdict(
        Kind.LOST,
        "FM-40",
        ranks,
        _others(snapshot.seats, ranks),
        "; ".join(f"rank {seat.rank} {words.death(seat)}: {words.was(seat)}" for seat in dead),
        max(seat.changed_ns for seat in dead),
    )


def _ended(snapshot: Snapshot, seat: Seat) -> Verdict:
    """The rank's own words. A check that all ranks make alike convicts whom a majority convicts, not who says so."""
    error = (seat.ending.error if seat.ending is not None else None) or {}
    evidence = error.get("evidence") or {}
    triggers: tuple[int, ...] = (seat.rank,)
    if seat.ending is None or seat.ending.exit_code in VICTIMS | WAITED:
        triggers = ()
    elif "minority" in evidence:
        triggers = tuple(evidence["minority"])
    elif evidence.get("differences"):
        row = next(iter(evidence["differences"].values()))
        triggers = odd_ones({int(rank): str(value) for rank, value in row.items()}, len(row))
    message = seat.ending.message if seat.ending is not None else "it left no report"
    return Verdict(
        Kind.ENDED,
        error.get("fm"),
        triggers,
        _others(snapshot.seats, triggers or (seat.rank,)),
        message if message.startswith("rank") else f"rank {seat.rank} ended itself: {message}",
        seat.ended_ns,
    )


def _killed(seat: Seat) -> bool:
    """Gone without having written an ending."""
    return seat.life is Life.GONE and seat.ending is None and not seat.finished


def _gave_up(seat: Seat) -> bool:
    """Ended by a deadline of its own."""
    return seat.ending is not None and seat.ending.exit_code in WAITED


def _told(seat: Seat) -> bool:
    if seat.ending is not None:
        return seat.ending.code == TOLD
    return seat.signal == SIGTERM


def _waits(seat: Seat) -> bool:
    return seat.inside is not None and not seat.left and seat.life is Life.ALIVE


def _allowed(seat: Seat, entry: Collective) -> bool:
    try:
        return entry.group in ALLOWED[Phase(seat.phase)]
    except ValueError:
        return True


def _group_of(snapshot: Snapshot, inside: Mapping[int, Collective]) -> Members:
    rank, entry = next(iter(inside.items()))
    return snapshot.seats[rank].groups[entry.group]


def _first(ranks: Iterable[int], triggers: tuple[int, ...]) -> list[int]:
    """The ranks to blame, then the others."""
    return [*triggers, *_others(ranks, triggers)]


def _others(ranks: Iterable[int], triggers: Iterable[int]) -> tuple[int, ...]:
    taken = set(triggers)
    return tuple(sorted(rank for rank in ranks if rank not in taken))
