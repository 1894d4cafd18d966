"""The rivals' table: one fault end to end, and the judgement of who was blamed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rivals import Run as Ended
from benchmarks.rivals import arms, words_of
from benchmarks.rivals.arms import DETAIL, GUARDED, PLAIN, TORCHRUN, Ending
from benchmarks.rivals.blame import judge
from benchmarks.rivals.faults import FAULTS
from tpctl.drill import table

ROOT = Path(__file__).parents[2]
BY_ID = {fault.id: fault for fault in FAULTS}
ROOT_CAUSE = """\
Root Cause (first observed failure):
[0]:
  host      : localhost
  rank      : {} (local_rank: 0)
"""
CLAIM = "Rank {} is running collective: CollectiveFingerPrint(SequenceNumber=7{}OpType={}"


def failed(log: str) -> Ending:
    return Ending(codes=[1], log=log)


@pytest.mark.parametrize(("rank", "right"), [(1, True), (0, False)])
def test_torchrun_is_judged_by_its_root_cause(rank: int, right: bool) -> None:
    blame = judge(TORCHRUN, BY_ID["kill-worker"], failed(ROOT_CAUSE.format(rank)))
    assert (blame.words, blame.right) == (f"rank {rank}", right)


def test_plain_processes_blame_nobody() -> None:
    assert judge(PLAIN, BY_ID["kill-worker"], failed("Connection closed by peer")).right is None


def test_detail_is_right_only_if_every_operation_is_the_true_one() -> None:
    true = CLAIM.format(0, ", ", "ALLREDUCE") + ", but " + CLAIM.format(1, ", ", "ALLGATHER")
    false = CLAIM.format(0, ", ", "ALLREDUCE") + ", but " + CLAIM.format(1, "", "GATHER")
    assert judge(DETAIL, BY_ID["conditional"], failed(true)).right is True
    blame = judge(DETAIL, BY_ID["conditional"], failed(false))
    assert (blame.words, blame.right) == ("rank 1 runs GATHER: untrue", False)


@pytest.mark.parametrize(
    ("fm", "triggers", "right"), [("FM-40", [1], True), ("FM-40", [0], False), ("FM-41", [1], False)]
)
def test_the_referee_is_judged_by_rank_and_failure_mode(fm: str, triggers: list[int], right: bool) -> None:
    ending = Ending(codes=[1], referee={"verdict": {"fm": fm, "triggers": triggers, "message": "said"}})
    assert judge(GUARDED, BY_ID["kill-worker"], ending).right is right


def test_a_job_that_hangs_and_one_that_ends_well_noticed_nothing() -> None:
    hung = Ended("cut", None, None, None, "nothing", None)
    well = Ended("silent", None, None, None, "nothing", None)
    assert words_of([hung]).startswith("hangs")
    assert words_of([well, well]) == "never noticed: exit code 0"


def test_every_drill_that_is_named_exists() -> None:
    drills = table.load()
    for fault in FAULTS:
        if fault.drill:
            assert table.select(drills, [fault.drill]), fault.id


def test_a_healthy_loop_ends_well(tmp_path: Path) -> None:
    ending = arms.run(PLAIN, None, tmp_path / "run", cut_s=60, chunks=4)
    assert ending.codes == [0, 0], ending.log
    assert ending.results[0]["sum"] == ending.results[1]["sum"] > 0


@pytest.mark.slow
def test_the_benchmark_gives_one_row_a_rival_and_a_table(tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    command = [sys.executable, "-m", "benchmarks", "rivals", "--quick", "--output", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(results.read_text())
    assert data["failures"] == {}
    rows = [row for row in data["rows"] if row.get("fault")]
    assert [(row["fault"], row["arm"]) for row in rows] == [
        ("kill-worker", arm) for arm in (PLAIN, TORCHRUN, DETAIL, GUARDED)
    ]
    # gloo closes its sockets with the process: every arm notices a death, each in its own time.
    for row in rows:
        assert row["runs"][0]["ending"] == "failed"
        assert 0 < row["runs"][0]["first_ms"] <= row["runs"][0]["ranks_gone_ms"] <= row["runs"][0]["gone_ms"]
        assert row["ratio"] == pytest.approx(row["ours"] / row["rival"])
    assert all(run["right"] for run in rows[0]["own_runs"])
    command = [sys.executable, "-m", "benchmarks.rivals", str(results)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    heading, line, fault, count = printed.splitlines()
    assert heading.count("|") == line.count("|") == fault.count("|") == count.count("|") == 7
    assert fault.startswith("| a worker killed in mid-work |")
