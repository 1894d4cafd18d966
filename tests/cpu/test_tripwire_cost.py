"""The benchmark of the tripwires' cost: its arms do what their cadence says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measure import Pairs
from benchmarks.pair import run_pair
from benchmarks.tripwires import BARE, CADENCES, LIMIT_MS, _against, _measure
from engine.assets import generator_checkpoint
from engine.config import from_dict


def test_two_ranks_time_every_cadence_in_turns(weights_cache: Path) -> None:
    base = from_dict({"model": {"cache_dir": str(weights_cache)}, "plan": {"tp": 2}})
    generator_checkpoint(base)
    answer = run_pair(_measure, {"config": base.to_dict(), "turns": 1}, deadline_s=120)
    assert set(answer["times"]) == {*CADENCES, BARE}
    assert all(len(found) == 1 and found[0] > 0 for found in answer["times"].values())
    # Whatever the load of the machine: hashing 5.6 MB in each chunk is more work than two bare meetings.
    assert answer["cpu_times"]["bring-up"][0] > answer["cpu_times"][BARE][0]
    assert answer["bytes"] > 5e6


def test_a_cost_is_judged_against_its_limit() -> None:
    times = Pairs({"production": [0.0004, 0.0006, 0.0007]})
    row = _against("x", times, "production", LIMIT_MS, "the limit", 1.0)
    assert row.ours == pytest.approx(0.6)
    assert row.met is False
    assert _against("x", times, "production", LIMIT_MS, "the limit", None).met is None
