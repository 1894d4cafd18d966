"""Gates of the pp plans on recorded runs (rank 0's chunk records of the overlap drills), and on broken ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.measures import overlap, send_after_decode
from tests.cli.runs import CASE, observe, write_run
from tpctl.matrix.cases import builtin
from tpctl.matrix.gates import evaluate
from tpctl.matrix.observation import Observation
from tpctl.matrix.ppgates import SEND_AFTER_DECODE, held_back
from tpctl.matrix.report import remarks
from tpctl.matrix.runner import CaseResult
from tpctl.verdict import Finding, Verdict

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("data").joinpath("overlap.json").read_text()
)
PP = replace(CASE, plan="pp0", tp=1, chunks=14, reference=None)


def rows(name: str, **changes: Any) -> list[dict[str, Any]]:
    return [row | changes for row in RECORDED[name]]


def figures(found: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What rank 0 reports of a run with these chunks."""
    measured = overlap(found)
    depths = {"d_in": 2, "d_out": 2, "d_in_most": 2, "d_out_most": 1}
    return depths | {"overlap": measured.to_dict() if measured else None} | changes


def run(tmp_path: Path, name: str, chunks: list[dict[str, Any]], other: Observation | None = None, **changes: Any):
    def edit(reports: dict[int, dict[str, Any]]) -> None:
        reports[0] |= {"chunks": chunks, "generator": figures(chunks, **changes)}

    return observe(write_run(tmp_path / name, edit), replace(PP, id=name), other=other)


def test_the_signature_of_a_send_after_decode_tells_the_planted_run_from_all_others() -> None:
    planted = send_after_decode(rows("planted"))
    assert planted is not None
    assert planted.found
    for name in ("r1", "r0", "r0a"):
        healthy = send_after_decode(rows(name))
        assert healthy is not None
        assert not healthy.found, (name, healthy)
    # What the anchor needs is no bug: all that is decoded first here, is decoded for it.
    assert send_after_decode(rows("r0a-decode-first")) is None


def test_each_half_of_the_signature_alone_is_no_bug() -> None:
    """A mesh that waits because Stage 0 is slower has results waiting; empty queues alone are any R0a stream's."""
    busy = send_after_decode(rows("planted", d_out=1))
    prompt = send_after_decode(rows("planted", t_mesh_idle_ms=5.0))
    assert busy is not None
    assert prompt is not None
    assert (busy.tracks > 0.8, busy.empty, busy.found) == (True, 0.0, False)
    assert (prompt.tracks < 0.1, prompt.empty, prompt.found) == (True, 1.0, False)
    assert send_after_decode(rows("planted")[:4]) is None  # one pair of chunks after the warm-up proves nothing
    assert send_after_decode(rows("planted", init_cache=True)) is None  # a cut may wait for all before it


GATES: list[tuple[str, str, dict[str, Any], Verdict]] = [
    ("queue-bounds", "r1", {}, Verdict.PASS),
    ("queue-bounds", "r1", {"d_in_most": 3}, Verdict.FAIL),
    ("queue-bounds", "r1", {"d_out_most": 3}, Verdict.FAIL),
    ("queue-bounds", "r1", {"d_out_most": 0}, Verdict.FAIL),
    ("queue-bounds", "r1", {"d_out_most": None}, Verdict.UNKNOWN),
    ("sends-ahead", "r1", {}, Verdict.PASS),
    ("sends-ahead", "r0a", {}, Verdict.PASS),
    ("sends-ahead", "planted", {}, Verdict.FAIL),
    ("sends-ahead", "r0a-decode-first", {}, Verdict.UNKNOWN),
    ("send-after-decode", "planted", {}, Verdict.PASS),
    ("send-after-decode", "r1", {}, Verdict.FAIL),
    ("send-after-decode", "r0a-decode-first", {}, Verdict.UNKNOWN),
    ("deeper-only-waits", "r1", {}, Verdict.UNKNOWN),
    ("coupling", "r0a", {}, Verdict.UNKNOWN),
]


@pytest.mark.parametrize(("gate", "name", "changes", "verdict"), GATES)
def test_gates_of_one_run(tmp_path: Path, gate: str, name: str, changes: dict[str, Any], verdict: Verdict) -> None:
    finding = evaluate(gate, run(tmp_path, name, rows(name), **changes))
    assert finding.verdict is verdict, finding


def test_records_of_another_build_are_unknown_not_healthy(tmp_path: Path) -> None:
    chunks = rows("r1")
    for row in chunks:
        del row["t_anchor_ms"]
    seen = run(tmp_path, "r1", rows("r1"))
    seen.reports[0]["chunks"] = chunks
    assert evaluate("sends-ahead", seen).verdict is Verdict.UNKNOWN
    assert held_back(seen) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "slower", "verdict"),
    [
        (6.0, 4.0, 1.0, Verdict.PASS),
        (4.2, 4.0, 1.0, Verdict.FAIL),  # deeper queues that hold no more are not deeper
        (6.0, 4.0, 1.5, Verdict.FAIL),  # the shallower ones do not hold the overlap
    ],
)
def test_deeper_queues(tmp_path: Path, ours: float, theirs: float, slower: float, verdict: Verdict) -> None:
    found = figures(rows("r1"))["overlap"]
    late = {"period_ms": found["period_ms"] * slower}
    shallow = run(tmp_path, "O-01.2-2", rows("r1"), overlap=found | late | {"latency_ms": theirs * late["period_ms"]})
    deep = run(tmp_path, "O-01.4-4", rows("r1"), shallow, overlap=found | {"latency_ms": ours * found["period_ms"]})
    finding = evaluate("deeper-only-waits", deep)
    assert finding.verdict is verdict, finding


def coupled(tmp_path: Path, ours: str, coupled: str, free: str) -> Observation:
    r1 = run(tmp_path, "O-03.r1", rows(free))
    first = run(tmp_path, "O-03.r0a-decode-first", rows(coupled), r1)
    r0 = run(tmp_path, "O-03.r0", rows("r0"), first)
    return run(tmp_path, "O-03.r0a", rows(ours), r0)


def test_what_the_coupling_costs_is_said_in_one_line(tmp_path: Path) -> None:
    seen = coupled(tmp_path, "r0a", "r0a-decode-first", "r1")
    finding = evaluate("coupling", seen)
    assert finding.verdict is Verdict.PASS, finding
    (line,) = remarks([CaseResult(seen.case, seen.run_dir, (finding,), {})])
    assert line.startswith("O-03.r0a: the period, of both stages one after the other: R1 0.5")
    assert "decoding the anchor first wins back" in line
    # Nothing won: anchor-first as slow as decoding all.
    lost = evaluate("coupling", coupled(tmp_path / "lost", "r0a-decode-first", "r0a-decode-first", "r1"))
    assert lost.verdict is Verdict.FAIL, lost
    # Nothing to win: the coupled run is no slower than the free one.
    blind = evaluate("coupling", coupled(tmp_path / "blind", "r0a", "r1", "r0a-decode-first"))
    assert blind.verdict is Verdict.UNKNOWN, blind


def test_a_run_that_nobody_broke_is_warned_about_by_name(tmp_path: Path) -> None:
    found = held_back(run(tmp_path, "planted", rows("planted")))
    assert found is not None
    assert (found.id, found.verdict) == (SEND_AFTER_DECODE, Verdict.WARN)
    assert "ms of decode" in found.message
    assert held_back(run(tmp_path, "r1", rows("r1"))) is None
    planted = replace(PP, id="on-purpose", gates=("send-after-decode",))
    assert held_back(observe(tmp_path / "planted", planted)) is None


def test_the_overlap_drills_are_cases_of_level_3() -> None:
    chosen = [case.id for case in builtin(3).select(["O-*"]).cases]
    assert [name for name in chosen if name.startswith("O-01")] == [
        f"O-01.{depths}" for depths in ("2-2", "1-1", "1-4", "4-1", "3-3", "4-4")
    ]
    assert chosen[-1] == "O-03.r0a"
    assert all(name.startswith("O-") for name in chosen)


def test_findings_of_other_gates_are_no_remarks(tmp_path: Path) -> None:
    result = CaseResult(PP, tmp_path, (Finding("calls", Verdict.PASS, "70 calls"),), {})
    assert remarks([result]) == []
