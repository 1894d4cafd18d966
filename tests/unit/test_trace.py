"""Timelines from records alone: a plan without pp, clocks of several hosts, a phase B that never ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine.blackbox import BlackBox
from tests.cli.runs import chunk, write_run
from tests.support.traces import problems
from tpctl.trace.bars import Bar, Kind, Lane
from tpctl.trace.clocks import across_link, across_mesh, one_clock
from tpctl.trace.events import trace
from tpctl.trace.files import draw
from tpctl.trace.run import read_run
from tpctl.trace.stages import stages

MS = 1_000_000
TURN_MS, B_MS = 100.0, 60.0


def turn(index: int, follows: bool) -> dict:
    """One chunk of a mesh rank, 100 ms long: on rank 0 A, frame, B, C; elsewhere the frame comes before A."""
    ended = (index + 1) * TURN_MS
    c_ms = 20.0 if not follows else 0.001
    times = {"t_a_ms": 15.0 if not follows else 0.001, "t_frame_ms": 5.0 if not follows else 39.0, "t_c_ms": c_ms}
    began_b = ended - c_ms - B_MS if not follows else ended - B_MS - 20.0
    end_ns = ended if not follows else ended - 20.0
    return chunk(index, **times, t_b_ms=B_MS, period_ms=TURN_MS, ended_ns=int(end_ns * MS), tB0_ns=int(began_b * MS))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    def edit(reports: dict) -> None:
        for rank, report in reports.items():
            report["chunks"] = [turn(index, rank > 0) for index in range(5)]

    return write_run(tmp_path / "tp", edit, chunks=5)


def test_a_plan_without_pp_has_its_calls_and_its_mesh(run_dir):
    run = read_run(run_dir)
    made = trace(run, "t")
    assert problems(made) == []
    flows: dict[tuple[str, int], str] = {}
    for event in (e for e in made["traceEvents"] if e["ph"] in "stf"):
        key = event["name"], event["id"]
        flows[key] = flows.get(key, "") + event["ph"] + str(event["pid"])
    assert sorted(flows.values()) == ["s0f1"] * 5 + ["s0t0f0"] * 5
    kinds = {(bar.rank, bar.kind) for bar in run.bars}
    assert (1, Kind.decode) not in kinds  # a worker without codecs decodes nothing
    assert (1, Kind.receive) in kinds
    assert run.overlap is None
    drawn = draw(run_dir, "two ranks")
    assert sorted(drawn.outputs) == ["overlap", "timeline"]
    text = Path(drawn.outputs["overlap"]).read_text()
    assert "period 100 ms" in text
    assert "no OverlapScore" in text


def test_the_stage_that_takes_most_of_the_period_is_named_after_the_warm_up():
    rows = [turn(index, False) | {"t_sink_ms": 0.0} for index in range(5)]
    spent = stages(rows)
    assert (spent.slowest, spent.period_ms, spent.chunks) == ("generate", TURN_MS, 3)
    waiting = [row | {"t_c_ms": 90.0, "t_sink_ms": 70.0} for row in rows]
    assert stages(waiting).times_ms == {"prepare": 15, "envelope": 5, "generate": B_MS, "decode": 20, "sink": 70}
    assert stages(waiting).slowest == "sink"
    slow_start = [*waiting[:2], *rows[2:]]
    assert stages(slow_start).slowest == "generate"
    assert stages(rows[:2]) is stages([turn(index, False) for index in range(5)]) is None


def test_the_last_chunks_alone(run_dir):
    bars = [bar for bar in read_run(run_dir, last=2).bars if bar.kind is Kind.generate and bar.rank == 1]
    assert [bar.chunk_index for bar in bars] == [3, 4]


def test_a_phase_b_that_never_ended_is_drawn_to_now(run_dir):
    """The black box of this very process, which lives: it entered phase B and has not left."""
    path = run_dir / "ranks" / "rank1.blackbox"
    box = BlackBox(path, 1)
    ids = {"call_id": 9, "chunk_index": 8, "cache_epoch": 0}
    box.commit("enter B", "mesh_pg", ids)
    report = run_dir / "ranks" / "rank1.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"pid": os.getpid(), "host": os.uname().nodename}))
    (open_,) = [bar for bar in read_run(run_dir).bars if bar.open]
    assert (open_.kind, open_.call_id, open_.rank) == (Kind.generate, 9, 1)
    made = trace(read_run(run_dir), "t")
    assert problems(made) == []
    assert [e["name"] for e in made["traceEvents"] if e.get("args", {}).get("unfinished")] == [
        "generate 8 (unfinished)"
    ]
    box.commit("leave B", "mesh_pg", ids)
    assert not [bar for bar in read_run(run_dir).bars if bar.open]
    box.close()


def generated(rank: int, ends_ms: list[float], off_ms: float = 0.0) -> list[Bar]:
    return [
        Bar(rank, Lane.b, Kind.generate, int((end - 10 + off_ms) * MS), int((end + off_ms) * MS), call_id=call_id)
        for call_id, end in enumerate(ends_ms)
    ]


def test_mesh_ranks_are_placed_by_leaving_phase_b_together():
    ends = [10.0, 25.0, 47.0, 60.0]
    found = across_mesh(generated(1, ends), generated(2, [end + 0.5 * (n % 2) for n, end in enumerate(ends)], -3000.0))
    assert abs(found.by_ns - 3000 * MS) <= found.error_ns == MS // 4
    assert across_mesh(generated(1, ends), []).error_ns is None


def test_the_leader_is_placed_between_what_was_sent_and_what_arrived():
    rows = [{"call_id": n, "tSent_ms": 100.0 * n, "tArrived_ms": 100.0 * n + 30.0} for n in range(3)]
    leader = generated(1, [100.0 * n + 20.0 for n in range(3)], 500.0)
    leader += [
        Bar(1, Lane.link, Kind.answer, int((100.0 * n + 525.0) * MS), int((100.0 * n + 530) * MS), call_id=n)
        for n in range(3)
    ]
    found = across_link(rows, 0, leader)
    assert abs(found.by_ns + 500 * MS) <= found.error_ns
    assert not one_clock(rows, 0, leader)
    assert one_clock(rows, 0, [bar.shifted(-500 * MS) for bar in leader])
    assert one_clock(rows, 0, [])  # nothing says that it is another
    assert across_link([], 0, leader).error_ns is None
