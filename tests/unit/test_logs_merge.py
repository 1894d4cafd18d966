"""Merging logs: cause before effect, no two lines of one writer swapped, nothing a file says is trusted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from engine.log import Level, log_path
from tpctl.commands.logs import parse_since
from tpctl.errors import CliError
from tpctl.logs.entry import Entry, Origin
from tpctl.logs.merge import Merger
from tpctl.logs.sources import RankLog, SupervisorLog, TextLog

WALL_S = 1_800_000_000.0


def entry(rank: int, mono_s: float, call_id: int | None = None, host: str = "a", drift_s: float = 0.0) -> Entry:
    return Entry(
        source=f"rank {rank}",
        origin=Origin.rank,
        level=Level.info,
        message="m",
        rank=rank,
        seq=int(mono_s * 1e3),
        unix_s=WALL_S + mono_s + drift_s,
        mono_ns=int(mono_s * 1e9),
        host=host,
        ids={"call_id": call_id},
    )


def text(source: str, unix_s: float | None) -> Entry:
    return Entry(source, Origin.supervisor, Level.info, "t", unix_s=unix_s)


def test_on_one_host_the_monotonic_clock_decides_whatever_the_time_of_day_does():
    """Rank 1's time of day was set back an hour in between; it must not matter."""
    one = [entry(0, 1.0), entry(0, 3.0)]
    two = [entry(1, 2.0), entry(1, 4.0, drift_s=-3600.0)]
    merged = Merger().take({"rank 0": one, "rank 1": two})
    assert [(e.rank, e.mono_ns // 10**9) for e in merged] == [(0, 1), (1, 2), (0, 3), (1, 4)]


def test_no_writers_own_order_is_ever_changed():
    chance = random.Random(3)
    batches = {}
    for rank in range(4):
        rows = [entry(rank, chance.uniform(0, 10), call_id=chance.randrange(9), host=f"h{rank % 2}") for _ in range(50)]
        batches[f"rank {rank}"] = rows
    merged = Merger().take(batches)
    assert len(merged) == 200
    for name, rows in batches.items():
        assert [e for e in merged if e.source == name] == rows


def test_between_hosts_the_call_decides():
    """Host b's clocks are both an hour ahead: its work on call 1 still stands before call 2 on host a."""
    a = [entry(0, 1.0, 0), entry(0, 2.0, 1), entry(0, 3.0, 2)]
    b = [entry(1, 3601.1, 0, "b"), entry(1, 3602.1, 1, "b"), entry(1, 3603.1, 2, "b")]
    said = text("supervisor", WALL_S + 2.5)
    merged = Merger().take({"rank 0": a, "rank 1": b, "supervisor": [said]})
    assert [e.ids.get("call_id") for e in merged if e is not said] == [0, 0, 1, 1, 2, 2]
    assert merged.index(said) < merged.index(a[2])
    assert merged.index(said) > merged.index(a[0])


def test_a_time_of_day_is_placed_on_the_ranks_clock_and_a_line_without_any_stays_with_the_one_before():
    supervisor = [text("supervisor", WALL_S + 1.5), text("supervisor", None), text("supervisor", WALL_S + 9.0)]
    merged = Merger().take({"supervisor": supervisor, "rank 0": [entry(0, 1.0), entry(0, 2.0), entry(0, 3.0)]})
    assert [e.source for e in merged] == ["rank 0", "supervisor", "supervisor", "rank 0", "rank 0", "supervisor"]


def test_while_following_a_line_waits_for_those_before_it():
    """Rank 0's file was read before rank 1's: a line of rank 1 from after that look is held back."""
    merger = Merger()
    first = merger.take({"rank 0": [entry(0, 1.0)], "rank 1": [entry(1, 2.5)]}, until_ns=2 * 10**9)
    assert [e.rank for e in first] == [0]
    second = merger.take({"rank 0": [entry(0, 2.2)], "rank 1": []}, until_ns=3 * 10**9)
    assert [(e.rank, e.mono_ns) for e in second] == [(0, 2_200_000_000), (1, 2_500_000_000)]
    assert merger.take({}) == []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "ranks").mkdir()
    return tmp_path


GOOD = {
    "seq": 1,
    "ts": "2026-01-31T12:00:00.5Z",
    "mono_ns": 5,
    "level": "info",
    "rank": 0,
    "role": "stage0",
    "event": "state",
    "message": "m",
    "call_id": None,
    "chunk_index": None,
    "cache_epoch": None,
    "data": {},
}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '"text"',
        "[" * 100_000,
        "{}",
        json.dumps(GOOD | {"level": "loud"}),
        json.dumps(GOOD | {"ts": "soon"}),
        json.dumps(GOOD | {"seq": "1"}),
        json.dumps(GOOD | {"mono_ns": 1.5}),
        json.dumps(GOOD | {"call_id": "x"}),
        '{"schema": "tpctl.log", "schema_version": 9, "rank": 0}',
        '{"schema": "tpctl.log", "schema_version": 1, "rank": 4}',
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_read(line, run_dir):
    log_path(run_dir, 0).write_text(f"{line}\n{json.dumps(GOOD)}\n{json.dumps(GOOD | {'seq': 2})[:30]}")
    source = RankLog(run_dir, 0)
    assert [e.seq for e in source.poll()] == [1]
    assert len(source.problems) == 1
    assert "rank0.log.jsonl" in source.problems[0]


def test_what_a_file_says_cannot_command_the_terminal(run_dir):
    log_path(run_dir, 0).write_text(json.dumps(GOOD | {"message": "\x1b[2Jgone", "event": "a\nb"}) + "\n")
    (found,) = RankLog(run_dir, 0).poll()
    assert "\x1b" not in found.line()
    assert "\n" not in found.line()


def test_the_launchers_own_lines_tell_time_and_level_and_a_traceback_goes_with_them(run_dir):
    path = run_dir / "launcher.log"
    path.write_text(
        "E0131 10:00:00.250000 77 torch/distributed/api.py:1002] failed (exitcode: -9)\n"
        "Traceback (most recent call last):\n"
        "referee: lost [FM-40]: told elsewhere\n"
        "W0131 10:00:01.000000 77 torch/x.py:1] closing\nhalf a li"
    )
    source = TextLog(path, Origin.launcher)
    found = source.poll()
    assert [(e.message, e.level.value, e.continues) for e in found] == [
        ("failed (exitcode: -9)", "error", False),
        ("Traceback (most recent call last):", "error", True),
        ("closing", "warning", False),
    ]
    assert found[0].unix_s == found[1].unix_s == found[2].unix_s - 0.75
    with path.open("a") as stream:
        stream.write("ne\n")
    assert [e.message for e in source.poll()] == ["half a line"]


def test_the_supervisors_lines_are_those_of_the_attempt(run_dir):
    path = run_dir / "supervisor.log"
    path.write_text(
        "2026-01-31T12:00:00.000+00:00 supervisor: attempt 0: 2 rank(s)\n"
        "2026-01-31T12:00:09.000+00:00 supervisor: attempt 0 failed: rank 1\n  a second line\n"
        "2026-01-31T12:01:00.000+00:00 supervisor: attempt 1: 2 rank(s)\n"
    )
    began = 1769860800.0
    first = SupervisorLog(path, began, began + 59).poll()
    assert [(e.message.strip(), e.level.value) for e in first] == [
        ("attempt 0: 2 rank(s)", "info"),
        ("attempt 0 failed: rank 1", "warning"),
        ("a second line", "info"),
    ]
    assert [e.message for e in SupervisorLog(path, began + 59, None).poll()] == ["attempt 1: 2 rank(s)"]


def test_since_is_an_age_or_a_moment():
    assert parse_since("5m", 1000.0) == 700.0
    assert parse_since("1.5h", 10_000.0) == 4600.0
    assert parse_since("1970-01-01T00:01:00+00:00", 0.0) == 60.0
    assert parse_since(None, 0.0) is None
    for wrong in ("", "5", "5 m", "-5m", "m", "yesterday", "1e3s"):
        with pytest.raises(CliError, match="--since"):
            parse_since(wrong, 0.0)
