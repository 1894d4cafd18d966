"""The judge, by table: whom a snapshot convicts, of what, and when it convicts nobody."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest

from engine.blackbox import Collective, Members
from engine.lifecycle import RankState
from engine.referee.__main__ import GRACE_S, LEAVING_S, patience_s
from engine.referee.judge import MAJORITY_NS, SETTLE_NS, Kind, Verdict, judge
from engine.referee.ledgers import Ledgers
from engine.referee.snapshot import Difference, Ending, Life, Seat, Snapshot

NOW = 10_000_000_000
MS = 1_000_000


def groups(size: int) -> dict[str, Members]:
    names = ("mesh_pg", "world_pg", "pp_pg.up", "pp_pg.down")
    return {name: Members(name, 0, tuple(range(size))) for name in names}


def entry(place: int, *, group: str = "mesh_pg", op: str = "all_reduce", what: str = "float32[8]", t: int = NOW):
    hash_u64 = zlib.crc32(f"{group} {op} {what}".encode())
    return Collective(place, t, place, 7, 3, 0, hash_u64, group, op, what, "engine/x.py", 10 + place)


def seat(rank: int, size: int = 2, *, mesh: int = 0, world: int = 0, **fields) -> Seat:
    return Seat(rank, 100 + rank, groups=groups(size), counts={"mesh_pg": mesh, "world_pg": world}, **fields)


def inside(rank: int, place: int, size: int = 2, *, mesh: int = 0, world: int = 0, **of) -> Seat:
    call = entry(place, **of)
    counts = {"mesh_pg": mesh, "world_pg": world} | {call.group: place}
    return Seat(rank, 100 + rank, inside=call, last=call, groups=groups(size), counts=counts)


PP = {
    "pp_pg.down": Members("pp_pg.down", 0, (0, 1)),
    "pp_pg.up": Members("pp_pg.up", 1, (0, 1)),
    "mesh_pg": Members("mesh_pg", 1, (1, 2)),
    "world_pg": Members("world_pg", 0, (0, 1, 2)),
}


def pp_seat(rank: int, *, down: int = 0, up: int = 0, mesh: int = 0, **fields) -> Seat:
    """Rank 0 is Stage 0, rank 1 the leader; `down` and `up` count the messages that it sent or made room for."""
    counts = {"pp_pg.down": down, "pp_pg.up": up, "mesh_pg": mesh, "world_pg": 2}
    own = {name: group for name, group in PP.items() if rank in group.ranks}
    return Seat(rank, 100 + rank, groups=own, counts=counts, phase="link", **fields)


def pp_inside(rank: int, where: str, place: int, **counts: int) -> Seat:
    """It waits in this place: in a message of the link, for the header in `mesh_pg`, or astray in `world_pg`."""
    name, of = (where, HEADER) if where.endswith("_pg") else (f"pp_pg.{where}", {"op": "message", "what": "uint8[8]"})
    call = entry(place, group=name, **of)
    found = pp_seat(rank, **counts)
    return replace(found, inside=call, last=call, counts={**found.counts, name: place})


HEADER = {"op": "broadcast", "what": "uint8[64]"}


def gone(rank: int, size: int = 2, *, at: int = NOW, signal: int | None = 9, mesh: int = 0) -> Seat:
    return seat(rank, size, mesh=mesh, life=Life.GONE, changed_ns=at, wait_status=signal)


def ended(rank: int, exit_code: int, size: int = 2, *, at: int = NOW, mesh: int = 0, **error) -> Seat:
    record = {"code": "TP-6001", "message": "a check failed", "fm": None, "evidence": {}} | error
    return seat(
        rank,
        size,
        mesh=mesh,
        life=Life.GONE,
        changed_ns=at,
        state=RankState.ABORTED if exit_code else RankState.EXITED,
        state_ns=at,
        ending=Ending(exit_code, record if exit_code else None),
        ending_ns=at,
    )


def given_up(at: int) -> dict[str, object]:
    """The fields of a rank whose deadline ended it in the middle of what it did."""
    ending = Ending(72, {"code": "TP-6402", "message": "waited", "fm": "FM-41", "evidence": {}})
    return {"life": Life.GONE, "state": RankState.ABORTED, "state_ns": at, "ending": ending, "ending_ns": at}


def snapshot(*seats: Seat, t: int = NOW, size: int | None = None, differences: tuple[Difference, ...] = ()) -> Snapshot:
    return Snapshot(t, tuple(range(size or len(seats))), {each.rank: each for each in seats}, differences)


def difference(size: int, **entered: Collective) -> Difference:
    return Difference(groups(size)["mesh_pg"], 5, {int(rank[1:]): call for rank, call in entered.items()})


X, Y = entry(5), entry(5, op="all_gather", what="int64[3]")

HEALTHY = {
    "nobody seen yet": snapshot(size=2),
    "loading, long ago": snapshot(*(seat(r, state=RankState.LOADING, state_ns=1) for r in range(2)), t=NOW * 1000),
    "one warms up while one waits": snapshot(inside(0, 4), seat(1, mesh=3, state=RankState.WARMING), t=NOW * 1000),
    "a slow rank": snapshot(inside(0, 4), seat(1, mesh=3), t=NOW * 1000),
    "idle: waiting for a header": snapshot(seat(0, mesh=3), inside(1, 4, **HEADER), t=NOW * 1000),
    "both inside the same place": snapshot(inside(0, 4), inside(1, 4)),
    "the sender of a header is ahead": snapshot(inside(0, 9, **HEADER), inside(1, 7, **HEADER)),
    "leader in a broadcast that needs nobody": snapshot(
        inside(0, 4, **HEADER), inside(1, 2, mesh=3, group="world_pg"), t=NOW * 1000
    ),
    "an idle pp job: the leader waits for an envelope, the mesh for its leader": snapshot(
        pp_seat(0, down=6, up=4), pp_inside(1, "down", 7, up=3), pp_inside(2, "mesh_pg", 9, mesh=8), t=NOW * 1000
    ),
    "a pp job at work: Stage 0 waits for an answer, the leader makes it": snapshot(
        pp_inside(0, "up", 4, down=6), pp_seat(1, down=6, up=3, mesh=9), pp_inside(2, "mesh_pg", 10), t=NOW * 1000
    ),
    "the answer is under way, and Stage 0 has not looked yet": snapshot(
        pp_inside(0, "up", 4, down=6), pp_inside(1, "up", 4, down=6), pp_inside(2, "mesh_pg", 9), t=NOW * 1000
    ),
    "it was answered, and Stage 0 has not looked yet": snapshot(
        pp_inside(0, "up", 4, down=6), pp_inside(1, "down", 7, up=4), pp_inside(2, "mesh_pg", 9), t=NOW * 1000
    ),
    "the next envelope is on its way to a leader that waits for it": snapshot(
        pp_inside(0, "up", 4, down=7), pp_inside(1, "down", 7, up=3), pp_inside(2, "mesh_pg", 9), t=NOW * 1000
    ),
    "Stage 0 has said SHUTDOWN and left, and the leader has not looked yet": snapshot(
        pp_seat(0, down=7, up=4, state=RankState.EXITED), pp_inside(1, "down", 7, up=3), pp_inside(2, "mesh_pg", 9)
    ),
    "drained, one after the other": snapshot(ended(0, 0, mesh=9), seat(1, mesh=9, state=RankState.SHUTDOWN)),
    "drained, the other still in the last place": snapshot(ended(0, 0, mesh=9), inside(1, 9, **HEADER)),
    "all drained": snapshot(ended(0, 0), ended(1, 0)),
    "all told to leave": snapshot(ended(0, 143, code="TP-6403"), gone(1, signal=15)),
    "waits for a rank that was never seen": snapshot(inside(0, 4), size=2, t=NOW * 1000),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_verdict(name: str) -> None:
    assert judge(HEALTHY[name]) is None


GUILTY: dict[str, tuple[Snapshot, Kind, str | None, tuple[int, ...], tuple[int, ...]]] = {
    "an envelope without an answer: both ends of the pp link wait": (
        snapshot(pp_inside(0, "up", 4, down=6), pp_inside(1, "down", 7, up=3), pp_inside(2, "mesh_pg", 9, mesh=8)),
        *(Kind.DEADLOCK, "FM-03", (), (0, 1)),
    ),
    "the leader is astray, and Stage 0 waits behind it": (
        snapshot(
            pp_inside(0, "up", 4, down=6),
            replace(pp_inside(1, "world_pg", 3, down=6, up=3, mesh=8), phase="B"),
            replace(pp_inside(2, "mesh_pg", 9), phase="B"),
        ),
        *(Kind.DEADLOCK, "FM-22", (1,), (2,)),
    ),
    "Stage 0 drained, and the leader was not told": (
        snapshot(
            pp_seat(0, down=6, up=4, state=RankState.EXITED, state_ns=NOW),
            pp_inside(1, "down", 7, up=3),
            pp_inside(2, "mesh_pg", 9, mesh=8),
        ),
        *(Kind.LEFT, "FM-03", (), (1,)),
    ),
    "the leader never answered: Stage 0 waited until its deadline": (
        snapshot(
            replace(pp_inside(0, "up", 4, down=6), **given_up(NOW)),
            pp_seat(1, down=6, up=3),
            pp_inside(2, "mesh_pg", 9, mesh=8),
        ),
        *(Kind.LATE, "FM-41", (1,), (0, 2)),
    ),
    "one slept in phase B, and its own deadline came a millisecond before that of the one that waited": (
        snapshot(
            replace(ended(1, 72, mesh=4, at=NOW - MS, code="TP-6402", fm="FM-41"), last=entry(4)),
            replace(inside(0, 5), **given_up(NOW)),
        ),
        *(Kind.LATE, "FM-41", (1,), (0,)),
    ),
    "two ranks differ: nobody is convicted": (
        snapshot(inside(0, 5), inside(1, 5), differences=(difference(2, r0=X, r1=Y),)),
        *(Kind.MISMATCH, "FM-03", (), (0, 1)),
    ),
    "three ranks: the odd one": (
        snapshot(*(inside(r, 5, 3) for r in range(3)), differences=(difference(3, r0=X, r1=Y, r2=X),)),
        *(Kind.MISMATCH, "FM-03", (1,), (0, 2)),
    ),
    "four ranks, two against two: no majority": (
        snapshot(*(inside(r, 5, 4) for r in range(4)), differences=(difference(4, r0=X, r1=Y, r2=X, r3=Y),)),
        *(Kind.MISMATCH, "FM-03", (), (0, 1, 2, 3)),
    ),
    "a difference outranks the error it led to": (
        snapshot(ended(0, 74), ended(1, 70), differences=(difference(2, r0=X, r1=Y),)),
        *(Kind.MISMATCH, "FM-03", (), (0, 1)),
    ),
    "wrong group": (
        snapshot(inside(0, 5, world=2), inside(1, 3, group="world_pg", mesh=4)),
        *(Kind.DEADLOCK, "FM-22", (1,), (0,)),  # phase B allows mesh_pg alone
    ),
    "each in another group, which the phase allows": (
        snapshot(
            replace(inside(0, 5, world=2), phase="handshake"),
            replace(inside(1, 3, group="world_pg", mesh=4, what="int64[1]"), phase="handshake"),
        ),
        *(Kind.DEADLOCK, "FM-03", (), (0, 1)),
    ),
    "four ranks, one astray": (
        snapshot(
            *(replace(inside(r, 5, 4, world=2), phase="handshake") for r in (0, 1, 3)),
            replace(inside(2, 3, 4, group="world_pg", mesh=4), phase="handshake"),
        ),
        *(Kind.DEADLOCK, "FM-22", (2,), (0, 1, 3)),
    ),
    "waits for one that finished": (
        snapshot(inside(0, 5), ended(1, 0, mesh=4)),
        *(Kind.LEFT, "FM-03", (), (0,)),
    ),
    "two wait for one that finished": (
        snapshot(inside(0, 5, 3), ended(1, 0, 3, mesh=4), inside(2, 5, 3)),
        *(Kind.LEFT, "FM-03", (1,), (0, 2)),
    ),
    "one waits, two finished": (
        snapshot(ended(0, 0, 3, mesh=4), ended(1, 0, 3, mesh=4), inside(2, 5, 3)),
        *(Kind.LEFT, "FM-03", (2,), ()),
    ),
    "stopped in mid stream": (
        snapshot(inside(0, 5), replace(seat(1, mesh=4), life=Life.STOPPED, changed_ns=NOW)),
        *(Kind.FROZEN, "FM-41", (1,), (0,)),
    ),
    "stopped while loading": (
        snapshot(replace(seat(0, state=RankState.LOADING), life=Life.STOPPED, changed_ns=NOW), seat(1)),
        *(Kind.FROZEN, "FM-41", (0,), (1,)),
    ),
    "stopped; its peer gave up by its own deadline": (
        snapshot(ended(0, 72), replace(seat(1, mesh=4), life=Life.STOPPED, changed_ns=NOW)),
        *(Kind.FROZEN, "FM-41", (1,), (0,)),
    ),
    "killed": (snapshot(inside(0, 5), gone(1)), *(Kind.LOST, "FM-40", (1,), (0,))),
    "killed; its peer died of it first in line": (
        snapshot(ended(0, 74, at=NOW + 3 * MS), gone(1, at=NOW + 5 * MS), t=NOW + 6 * MS),
        *(Kind.LOST, "FM-40", (1,), (0,)),
    ),
    "a tripwire; the launcher killed the other": (
        snapshot(ended(0, 70, fm="FM-30"), gone(1, at=NOW + 90 * MS)),
        *(Kind.ENDED, "FM-30", (0,), (1,)),
    ),
    "a tripwire that convicts another rank than the one that reports": (
        snapshot(ended(0, 70, 3, evidence={"minority": [2]}), seat(1, 3), seat(2, 3)),
        *(Kind.ENDED, None, (2,), (0, 1)),
    ),
    "a tripwire of two ranks: a difference": (
        snapshot(ended(0, 70, evidence={"minority": []}), seat(1)),
        *(Kind.ENDED, None, (), (1,)),
    ),
    "parity of three": (
        snapshot(*(ended(r, 75, 3, evidence={"differences": {"a": {"0": "x", "1": "y", "2": "x"}}}) for r in range(3))),
        *(Kind.ENDED, None, (1,), (0, 2)),
    ),
    "an error, then those whom it took along": (
        snapshot(ended(0, 73, at=NOW - MS), ended(1, 70, fm="FM-31", at=NOW)),
        *(Kind.ENDED, "FM-31", (1,), (0,)),
    ),
    "waited in vain until its deadline: the absentee is late": (
        snapshot(replace(ended(0, 72), inside=X, counts={"mesh_pg": 5}), seat(1, mesh=4)),
        *(Kind.LATE, "FM-41", (1,), (0,)),
    ),
    "the backend reported a peer that had drained": (
        snapshot(replace(ended(0, 74), last=X, counts={"mesh_pg": 5}), ended(1, 0, mesh=4)),
        *(Kind.LEFT, "FM-03", (), (0,)),
    ),
    "only victims, all gone": (snapshot(ended(0, 74), ended(1, 74)), *(Kind.ENDED, None, (), (1,))),
    "SIGTERM to one rank alone": (
        snapshot(gone(0, signal=15), seat(1), t=NOW + SETTLE_NS),
        *(Kind.LOST, "FM-40", (0,), (1,)),
    ),
}


@pytest.mark.parametrize("name", GUILTY)
def test_verdict(name: str) -> None:
    seen, kind, fm, triggers, victims = GUILTY[name]
    verdict = judge(seen)
    assert verdict is not None
    assert (verdict.kind, verdict.fm, verdict.triggers) == (kind, fm, triggers)
    assert verdict.victims == victims
    assert verdict.blame == ("rank" if triggers else "difference")
    assert "\n" not in verdict.message


def test_a_majority_that_is_still_arriving_is_waited_for() -> None:
    seats = (inside(0, 5, 3), inside(1, 5, 3), seat(2, 3, mesh=4))
    seen = snapshot(*seats, differences=(difference(3, r0=X, r1=Y),))
    assert judge(seen) is None
    late = judge(replace(seen, t_ns=NOW + MAJORITY_NS))
    assert late is not None
    assert late.triggers == ()


def test_victims_alone_are_no_cause_until_the_true_one_had_time_to_show() -> None:
    seen = snapshot(ended(0, 74), seat(1))
    assert judge(seen) is None
    verdict = judge(replace(seen, t_ns=NOW + SETTLE_NS))
    assert verdict is not None
    assert (verdict.kind, verdict.triggers) == (Kind.ENDED, ())


def test_what_two_ranks_did_is_said_with_file_and_line() -> None:
    verdict = judge(snapshot(inside(0, 5), inside(1, 5), differences=(difference(2, r0=X, r1=Y),)))
    assert verdict is not None
    assert "rank 0 all_reduce float32[8] at engine/x.py:15 (chunk 3, call 7)" in verdict.message
    assert "rank 1 all_gather int64[3] at engine/x.py:15 (chunk 3, call 7)" in verdict.message


@pytest.mark.parametrize(
    ("kind", "state", "patience"),
    [
        (Kind.LOST, RankState.RUNNING, 0.0),
        (Kind.MISMATCH, RankState.DRAINING, 0.0),
        (Kind.ENDED, RankState.RUNNING, GRACE_S),
        (Kind.ENDED, RankState.DRAINING, LEAVING_S),
    ],
)
def test_only_an_ending_of_its_own_gives_the_others_time(kind: Kind, state: RankState, patience: float) -> None:
    verdict = Verdict(kind, None, (0,), (1,), "", NOW)
    assert patience_s(verdict, seat(1, state=state)) == patience


def test_what_agrees_is_forgotten_and_what_differs_is_kept(tmp_path) -> None:
    from engine.blackbox import BlackBox, Box, pack_signature, pack_site

    def packed(rank: int, calls: list[str]) -> list[bytes]:
        box = BlackBox(tmp_path / f"box{rank}", rank)
        slot = box.open_group("mesh_pg", (0, 1))
        for op in calls:
            box.enter(slot, pack_signature(ord(op), "mesh_pg", op, "float32[8]"), pack_site("x.py", 1), {})
        with Box(tmp_path / f"box{rank}") as reading:
            return reading.collectives(0, len(calls))

    ledgers = Ledgers((0, 1))
    ledgers.know(groups(2).values())
    ledgers.add(0, packed(0, ["a", "a", "a"]))
    ledgers.add(1, packed(1, ["a", "a"]))
    assert ledgers.differences({0: seat(0), 1: seat(1)}) == ()
    assert len(ledgers._open) == 1
    ledgers.add(1, packed(1, ["a", "a", "b"])[2:])
    (found,) = ledgers.differences({0: seat(0), 1: seat(1)})
    assert (found.place, {rank: call.op for rank, call in found.entered.items()}) == (3, {0: "a", 1: "b"})
