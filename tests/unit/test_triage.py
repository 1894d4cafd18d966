"""Who began it: a table of observations."""

from __future__ import annotations

from typing import Any

import pytest

from tpctl.triage import RankSeen, Seen, judge
from tpctl.verdict import Verdict


def ended(rank: int, code: int | None, fm: str | None = None, **evidence: Any) -> RankSeen:
    error = {"code": "TP-6001", "message": "m", "fm": fm, "evidence": evidence} if code and code > 0 else None
    return RankSeen(rank, code, error=error, place="wait header")


LOST, BUDGET, ORPHAN = 74, 72, 71
TABLE = {
    "clean": ([ended(0, 0), ended(1, 0)], None, "PASS", (), None),
    "killed worker": ([ended(0, LOST), ended(1, -9)], None, "FAIL", (1,), "FM-40"),
    "killed without a trace": ([ended(0, LOST), ended(1, None)], None, "FAIL", (1,), "FM-40"),
    "frozen worker": ([ended(0, BUDGET), ended(1, None)], None, "FAIL", (1,), "FM-41"),
    "frozen leader": ([ended(0, None), ended(1, ORPHAN)], None, "FAIL", (0,), "FM-41"),
    "a tripwire with two ranks": ([ended(0, 70, "FM-30"), ended(1, 70, "FM-30")], None, "FAIL", (), "FM-30"),
    "a majority": ([ended(r, 70, "FM-32", minority=[2]) for r in range(3)], None, "FAIL", (2,), "FM-32"),
    "own fault, its peer lost": ([ended(0, 70, "FM-22"), ended(1, LOST)], None, "FAIL", (0,), "FM-22"),
    "the referee saw it": (
        [ended(0, LOST), ended(1, None)],
        {"culprits": [1], "message": "rank 1 is stopped", "fm": "FM-41"},
        "FAIL",
        (1,),
        "FM-41",
    ),
    "nothing known": ([ended(0, None), ended(1, None)], None, "UNKNOWN", (), None),
    "one report missing": ([ended(0, 0)], None, "UNKNOWN", (), None),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_trigger_stands_apart_from_the_victims(name: str) -> None:
    ranks, referee, verdict, trigger, fm = TABLE[name]
    found = judge(Seen(tuple(ranks), max(2, len(ranks)), referee))
    assert (found.verdict, found.trigger, found.fm) == (Verdict(verdict), trigger, fm), found.sentence
    assert not set(found.trigger) & set(found.victims)
    assert (found.words is None) == (fm is None)
