"""Who began it: a table of what runs leave. The same judge as the referee's, from records instead of live ranks."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import pytest

from engine.blackbox import Collective, Commitment, Contents, Live, Members, pack_signature, pack_site
from engine.blackbox.layout import CRC, ENTRY
from engine.lifecycle import RankState
from engine.referee.snapshot import Life
from tpctl.acts import last_acts
from tpctl.evidence import RankSeen, Seen
from tpctl.failuremodes import CODES, FAILURE_MODES
from tpctl.remains import BoxSeen, RefereeSaid, Report
from tpctl.triage import judge
from tpctl.verdict import Verdict

LOST, BUDGET, ORPHAN, TRIPWIRE = 74, 72, 71, 70


def entered(place: int, op: str = "all_reduce", group: str = "mesh_pg", line: int = 1) -> Collective:
    return Collective(
        place, place, place, 5, 5, 0, zlib.crc32(f"{op} {group}".encode()), group, op, "float32[8]", "m.py", line
    )


def box(size: int, at: Collective, *, waits: bool, state: RankState = RankState.RUNNING) -> BoxSeen:
    """A rank whose last collective is `at`; the ones before it are forgotten."""
    members = tuple(range(size))
    counts = {"world_pg": 2, "mesh_pg": 2} | {at.group: at.place}
    live = Live(state, 0, at.seq if waits else 0, 1, at.seq, 2, "B", tuple(counts.values()))
    groups = tuple(Members(name, 0, members) for name in counts)
    commit = Commitment(1, 1, "enter B", "mesh_pg", 5, 5, 0)
    return BoxSeen(Contents(0, 7, live, groups, (commit,), (at,)), (packed(at),))


def packed(entry: Collective) -> bytes:
    """As the black box keeps it."""
    ids = (entry.call_id, entry.chunk_index, entry.cache_epoch)
    raw = ENTRY.pack(entry.seq, entry.t_ns, entry.place, *ids)
    raw += pack_signature(entry.hash_u64, entry.group, entry.op, entry.what) + pack_site(entry.file, entry.line)
    return raw + CRC.pack(zlib.crc32(raw))


def ended(
    rank: int, code: int | None, error: str | None = None, fm: str | None = None, seen: BoxSeen | None = None, **ev: Any
) -> RankSeen:
    """A rank that wrote its end; with no code, one that is gone without a word."""
    name = error or {LOST: "TP-3001", BUDGET: "TP-6402", ORPHAN: "TP-6401"}.get(code or 0, "TP-6001")
    record = {"code": name, "message": f"{name} of rank {rank}", "fm": fm, "evidence": ev} if code else None
    report = Report(rank, 7, None, "aborted" if code else "running", code, record, 0)
    return RankSeen(rank, report, seen, Life.GONE)


def live(rank: int, seen: BoxSeen | None = None, life: Life = Life.ALIVE) -> RankSeen:
    return dataclasses.replace(ended(rank, None, seen=seen), life=life)


def unread(rank: int) -> RankSeen:
    return RankSeen(rank, problems=(f"rank{rank}.json is damaged",))


AT, BEFORE = entered(96), entered(95)
WAITS, AWAY = box(2, AT, waits=True), box(2, BEFORE, waits=False)
WAITS3, AWAY3 = box(3, AT, waits=True), box(3, BEFORE, waits=False)
ASTRAY, ASTRAY3 = (box(n, entered(7, group="world_pg"), waits=True) for n in (2, 3))
TOLD = ended(0, 143, "TP-6403")

# name: ranks, then verdict, triggers, parties, failure mode
TABLE: dict[str, tuple[list[RankSeen], str, tuple[int, ...], tuple[int, ...], str | None]] = {
    "clean": ([ended(0, 0), ended(1, 0)], "PASS", (), (), None),
    "killed worker": ([ended(0, LOST), ended(1, None)], "FAIL", (1,), (), "FM-40"),
    "killed leader": ([ended(0, None), ended(1, LOST)], "FAIL", (0,), (), "FM-40"),
    "frozen worker": ([ended(0, BUDGET, seen=WAITS), ended(1, None, seen=AWAY)], "FAIL", (1,), (), "FM-41"),
    "frozen leader, nobody in a collective": ([ended(0, None), ended(1, ORPHAN)], "FAIL", (0,), (), "FM-41"),
    "a frozen one of three": (
        [ended(0, BUDGET, seen=WAITS3), ended(1, BUDGET, seen=WAITS3), ended(2, None, seen=AWAY3)],
        "FAIL",
        (2,),
        (),
        "FM-41",
    ),
    "all killed at once": (
        [ended(0, None, seen=WAITS), ended(1, None, seen=AWAY)],
        "FAIL",
        (),
        (0, 1),
        None,
    ),
    "two in different groups, until their deadlines": (
        [ended(0, BUDGET, seen=WAITS), ended(1, BUDGET, seen=ASTRAY)],
        "FAIL",
        (1,),
        (),
        "FM-22",
    ),
    "one of three in another group, and all were killed": (
        [ended(0, None, seen=WAITS3), ended(1, None, seen=ASTRAY3), ended(2, None, seen=WAITS3)],
        "FAIL",
        (1,),
        (),
        "FM-22",
    ),
    "its peer drained": (
        [ended(0, LOST, seen=WAITS), ended(1, 0, seen=box(2, BEFORE, waits=False, state=RankState.EXITED))],
        "FAIL",
        (),
        (0,),
        "FM-03",
    ),
    "a tripwire with two ranks": (
        [ended(r, TRIPWIRE, fm="FM-30", by_rank={"0": 1, "1": 2}) for r in range(2)],
        "FAIL",
        (),
        (0, 1),
        "FM-30",
    ),
    "a majority": ([ended(r, TRIPWIRE, fm="FM-32", minority=[2]) for r in range(3)], "FAIL", (2,), (), "FM-32"),
    "a majority of the launch": (
        [ended(r, 75, "TP-3301", "FM-03", differences={"x": {"0": "a", "1": "b", "2": "a"}}) for r in range(3)],
        "FAIL",
        (1,),
        (),
        "FM-03",
    ),
    "own fault, its peer lost": ([ended(0, TRIPWIRE, fm="FM-22"), ended(1, LOST)], "FAIL", (0,), (), "FM-22"),
    "own fault, its peer killed meanwhile": (
        [ended(0, None), ended(1, TRIPWIRE, fm="FM-31")],
        "FAIL",
        (1,),
        (),
        "FM-31",
    ),
    "own fault, the others never met": (
        [ended(0, 75, "TP-3201", "FM-40"), ended(1, 77, "TP-4001")],
        "FAIL",
        (1,),
        (),
        None,
    ),
    "a frame refused, two ranks": ([ended(0, LOST), ended(1, TRIPWIRE, "TP-2206")], "FAIL", (), (0, 1), "FM-10"),
    "a frame refused by all receivers": (
        [ended(0, LOST, seen=AWAY3), *(ended(r, TRIPWIRE, "TP-2213", seen=AWAY3) for r in (1, 2))],
        "FAIL",
        (0,),
        (),
        None,
    ),
    "a frame refused by one of three receivers": (
        [
            ended(0, LOST, seen=box(4, AT, waits=True)),
            ended(1, TRIPWIRE, "TP-2213", seen=box(4, BEFORE, waits=False)),
            *(ended(r, LOST, seen=box(4, AT, waits=True)) for r in (2, 3)),
        ],
        "FAIL",
        (1,),
        (),
        None,
    ),
    "told twice": ([TOLD, ended(1, LOST)], "FAIL", (), (), None),
    "only victims": ([ended(0, LOST), ended(1, LOST)], "FAIL", (), (), None),
    "nobody came": ([ended(0, ORPHAN), ended(1, ORPHAN)], "FAIL", (), (), "FM-41"),
    "killed, but the other cannot be read": ([unread(0), ended(1, None)], "UNKNOWN", (), (), None),
    "lost, and the cause cannot be read": ([ended(0, LOST), unread(1)], "UNKNOWN", (), (), None),
    "own fault, the other cannot be read": ([ended(0, TRIPWIRE, fm="FM-31"), unread(1)], "FAIL", (0,), (), "FM-31"),
    "one cannot be read": ([ended(0, 0), unread(1)], "UNKNOWN", (), (), None),
    "alive": ([live(0, WAITS), live(1, AWAY)], "UNKNOWN", (), (), None),
    "alive and stopped": ([live(0, WAITS), live(1, AWAY, Life.STOPPED)], "FAIL", (1,), (), "FM-41"),
    "alive and astray": ([live(0, WAITS), live(1, ASTRAY)], "FAIL", (1,), (), "FM-22"),
}


# Its own fault first; then, on its way out, a collective that its peers did not expect.
ON_ITS_WAY_OUT = entered(96, op="broadcast", line=92)
TABLE |= {
    "own fault, then a heartbeat into its peers' collective": (
        [
            ended(0, TRIPWIRE, "TP-3101", "FM-22", seen=box(3, ON_ITS_WAY_OUT, waits=False)),
            *(ended(r, LOST, seen=WAITS3) for r in (1, 2)),
        ],
        "FAIL",
        (0,),
        (),
        "FM-22",
    ),
    "the same with two ranks": (
        [ended(0, TRIPWIRE, "TP-3101", "FM-22", seen=box(2, ON_ITS_WAY_OUT, waits=False)), ended(1, LOST, seen=WAITS)],
        "FAIL",
        (0,),
        (),
        "FM-22",
    ),
    "an extra collective, then a check that failed on all": (
        [
            ended(0, TRIPWIRE, fm="FM-30", seen=box(2, ON_ITS_WAY_OUT, waits=False), by_rank={"0": 1, "1": 2}),
            ended(1, TRIPWIRE, fm="FM-30", seen=box(2, AT, waits=False), by_rank={"0": 1, "1": 2}),
        ],
        "FAIL",
        (),
        (0, 1),
        "FM-03",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_trigger_stands_apart_from_the_victims(name: str) -> None:
    ranks, verdict, triggers, parties, fm = TABLE[name]
    found = judge(Seen(Path("run"), tuple(ranks)))
    assert (found.verdict, found.triggers, found.parties, found.fm) == (Verdict(verdict), triggers, parties, fm), (
        found.sentence
    )
    assert not {*found.triggers, *found.parties} & set(found.victims)
    assert (found.words is None) == (fm is None)


def test_clocks_do_not_decide() -> None:
    """The same records with every time turned around say the same."""
    for name, (ranks, *_) in TABLE.items():
        turned = []
        for rank in ranks:
            if rank.box is None:
                turned.append(rank)
                continue
            contents = rank.box.contents
            entries = tuple(dataclasses.replace(entry, t_ns=10**9 - entry.t_ns) for entry in contents.collectives)
            moment = dataclasses.replace(contents.live, state_ns=10**6 * (9 - rank.rank))
            changed = dataclasses.replace(contents, collectives=entries, live=moment)
            turned.append(dataclasses.replace(rank, box=BoxSeen(changed, tuple(map(packed, entries)))))
        assert judge(Seen(Path("run"), tuple(turned))) == judge(Seen(Path("run"), tuple(ranks))), name


def test_acts_are_ordered_by_what_the_ranks_share() -> None:
    """By the collectives of a group that all are in; where there is none, by call_id; never by clocks."""
    late = dataclasses.replace(BEFORE, t_ns=10**9)
    ranks = (ended(0, LOST, seen=WAITS3), ended(1, LOST, seen=box(3, late, waits=False)), ended(2, None, seen=AWAY3))
    acts = last_acts(Seen(Path("run"), ranks))
    assert [(act.after, act.rank) for act in acts if act.what.startswith("all_reduce")] == [(97, 1), (97, 2), (98, 0)]
    apart = (ended(0, LOST, seen=box(2, AT, waits=True)), ended(1, LOST), ended(2, None, seen=AWAY3))
    assert {act.after for act in last_acts(Seen(Path("run"), apart))} == {5}


def said(kind: str, fm: str | None, *triggers: int) -> RefereeSaid:
    return RefereeSaid(kind, fm, triggers, tuple({0, 1} - set(triggers)), "as seen from outside", {}, {})


def test_the_referee_saw_it_while_they_lived() -> None:
    ranks = (ended(0, LOST), ended(1, None))
    found = judge(Seen(Path("run"), ranks, said("frozen", "FM-41", 1)))
    assert (found.triggers, found.fm, found.sentence, found.source) == (
        (1,),
        "FM-41",
        "as seen from outside",
        "referee",
    )
    # Of a rank that ended itself, its own words say more than the referee's.
    own = judge(Seen(Path("run"), (ended(0, None), ended(1, TRIPWIRE, fm="FM-22")), said("ended", "FM-22", 1)))
    assert (own.triggers, own.sentence) == ((1,), "TP-6001 of rank 1")
    # What ranks did on their way out is seen from outside too, and is not the first cause.
    out = judge(Seen(Path("run"), (ended(0, TRIPWIRE, fm="FM-22"), ended(1, None)), said("mismatch", "FM-03", 0)))
    assert (out.triggers, out.fm) == ((0,), "FM-22")
    lost = judge(Seen(Path("run"), (unread(0), ended(1, None)), said("ended", "FM-22", 0)))
    assert (lost.triggers, lost.sentence) == ((0,), "as seen from outside")


def test_what_the_launcher_saw_first_tells_a_killed_rank_from_a_frozen_one() -> None:
    ranks = (ended(0, BUDGET, seen=WAITS), dataclasses.replace(ended(1, None, seen=AWAY), status=-9))
    assert judge(Seen(Path("run"), ranks, first_dead=0)).fm == "FM-41"
    killed = judge(Seen(Path("run"), ranks, first_dead=1))
    assert (killed.fm, killed.triggers) == ("FM-40", (1,))
    assert "signal 9" in killed.sentence
    both = tuple(dataclasses.replace(rank, report=None, status=-9) for rank in ranks)
    assert judge(Seen(Path("run"), both, first_dead=1)).triggers == (1,)


def test_every_failure_mode_has_words_and_a_runbook() -> None:
    assert all(mode.words and mode.runbook for mode in FAILURE_MODES.values())
    assert {group.fm for group in CODES.values()} - {None} <= set(FAILURE_MODES)
