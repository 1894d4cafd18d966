"""From what a run left to the snapshot that the referee's judge judges: one judge, while a job runs and after it.

Two things differ after the end. Nobody saw in which order the ranks ended, and clocks of hosts do not compare: the
order is made from what each one did (`standing`), and stands where the judge expects times. And a rank that waited
until its own deadline has left by now: `rewound` puts it back to where it waited, so that a deadlock, or a peer that
never came, shows as it did then. A rank that is gone without a word was still there, and silent, if its peers could
wait so long: the death of a process closes its connections, and its peers end at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from engine.blackbox import Collective
from engine.lifecycle import RankExit, RankState
from engine.referee.judge import TOLD, VICTIMS, WAITED
from engine.referee.ledgers import Ledgers
from engine.referee.snapshot import Difference, Ending, Life, Seat, Snapshot
from tpctl.evidence import RankSeen, Seen

LONG_AFTER_NS = 1 << 62
NEVER_JOINED = "TP-3201"
DEADLINES = ("TP-6401", "TP-6402")


def snapshot(seen: Seen, *, rewound: bool) -> Snapshot:
    """`rewound`: as it was just before the first rank gave up waiting."""
    order = {rank.rank: place for place, rank in enumerate(sorted(seen.ranks, key=standing), 1)}
    held = held_on(seen)
    # A rank of which nothing is known has no seat: nobody may be blamed by what is missing.
    known = [rank for rank in seen.ranks if rank.contents or rank.ended is not None or rank.silent]
    seats = {rank.rank: _seat(rank, order[rank.rank], held, rewound) for rank in known}
    expected = tuple(rank.rank for rank in seen.ranks)
    return Snapshot(LONG_AFTER_NS, expected, seats, differences(seen, seats))


def standing(rank: RankSeen) -> tuple[int, int, int, int]:
    """Who comes first as a cause: an own fault before a silent death before whoever only suffered; then by ids.

    A rank whose peer dies ends as a victim; so one with a fault of its own had it while its peers were there.
    """
    return (_tier(rank), *progress(rank), rank.rank)


def _tier(rank: RankSeen) -> int:
    code = rank.ended
    if code is None:
        return 1 if rank.silent else 6
    if code == 0:
        return 6
    if waited(rank):
        # Of two that gave up, the one outside every collective is the one that the other waited for.
        return 3 if rank.contents is not None and rank.contents.inside is not None else 4
    if code in VICTIMS or error_code(rank) == TOLD:
        return 5
    return 2 if error_code(rank) == NEVER_JOINED else 0


def waited(rank: RankSeen) -> bool:
    """It gave up at its own deadline. A heartbeat that nobody takes ends the leader by one, as a broken transport."""
    return rank.ended in WAITED or (bool(rank.ended) and error_code(rank) in DEADLINES)


def error_code(rank: RankSeen) -> str:
    return str((rank.report.error or {}).get("code", "")) if rank.report else ""


def progress(rank: RankSeen) -> tuple[int, int]:
    """How far it came, in the job's own time: the last call_id it acted for, and its collectives so far."""
    if rank.contents is None:
        return -1, 0
    calls = [act.call_id for act in rank.contents.commitments[-8:]]
    calls += [act.call_id for act in rank.contents.collectives[-1:]]
    return max(calls, default=-1), rank.contents.live.collectives


def held_on(seen: Seen) -> bool:
    """Whether silent ranks were there till the others gave up, or till all were ended from outside."""
    endings = [rank for rank in seen.ranks if rank.ended is not None]
    if seen.first_dead is not None and (first := seen.of(seen.first_dead)) is not None and first.silent:
        return False  # the launcher saw it fail before the others
    return not endings or any(waited(rank) for rank in endings)


def _seat(rank: RankSeen, place: int, held: bool, rewound: bool) -> Seat:
    contents, life = rank.contents, rank.life or Life.GONE
    ending = None
    if rank.ended is not None and rank.report is not None:
        ending = Ending(int(RankExit.PHASE_BUDGET) if waited(rank) else rank.ended, rank.report.error)
        life = Life.GONE
    elif life is Life.GONE and (held or not rank.silent):
        life = Life.ALIVE  # not known to be gone then, or not known at all: no ground to call it lost
    told = rank.report.state if rank.report else None
    state = contents.live.state if contents else RankState(told or RankState.STARTING)
    inside = contents.inside if contents else None
    if rewound and ending is not None and waited(rank) and inside is not None:
        ending, life, state = None, Life.ALIVE, RankState.RUNNING
    elif ending is not None and ending.exit_code:
        state = RankState.ABORTED
    seat = Seat(
        rank.rank,
        contents.pid if contents else 0,
        life,
        place,
        wait_status(rank.status) if ending is None and life is Life.GONE else None,
        state,
        place,
        ending=ending,
        ending_ns=place,
    )
    if contents is None:
        return seat
    return replace(
        seat,
        phase=contents.live.phase,
        inside=_at(inside) if inside else None,
        last=_at(contents.collectives[-1]) if contents.collectives else None,
        groups={group.name: group for group in contents.groups},
        counts={group.name: n for group, n in zip(contents.groups, contents.live.counts, strict=True)},
    )


def _at(entry: Collective) -> Collective:
    """Its time is its number among the rank's collectives: the same on every rank that keeps step."""
    return replace(entry, t_ns=entry.seq)


def wait_status(status: int | None) -> int | None:
    """An exit code, negative for a signal, as the kernel packs it."""
    return None if status is None else -status if status < 0 else status << 8


def differences(seen: Seen, seats: Mapping[int, Seat]) -> tuple[Difference, ...]:
    """Where ranks entered different things, as far back as their black boxes reach."""
    boxes = {rank.rank: rank.box for rank in seen.ranks if rank.box is not None}
    ledgers = Ledgers(tuple(boxes))
    for rank, box in boxes.items():
        ledgers.know(box.contents.groups)
        ledgers.add(rank, box.packed)
    return tuple(
        replace(difference, entered={rank: _at(entry) for rank, entry in difference.entered.items()})
        for difference in ledgers.differences(seats)
    )
