"""The referee beside real ranks: what it names, how fast the job is gone, and whom it leaves in peace."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.config import EngineConfig, from_dict
from tests.support import lockstep
from tests.support.ranks import Job, start_ranks
from tests.support.refereed import Beside, gone_after, referee

# Far above what is measured, and far below any timeout of the engine or the backend: load must not fail a test.
GONE_S = 5.0
LINES = Path(lockstep.__file__).read_text().splitlines()


def line_of(mark: str) -> str:
    (number,) = [number for number, line in enumerate(LINES, 1) if line.endswith(f"# {mark}")]
    return f"tests/support/lockstep.py:{number}"


def streaming_config(cache: Path) -> EngineConfig:
    """Deadlines of minutes: nothing but the referee can end this job soon."""
    return from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "plan": {"tp": 2},
            "run": {"chunks": 10_000},
            "sink": {"kinds": ["null"]},
            "liveness": {"watchdog_s": 300.0, "phase_budget_s": 300.0},
        }
    )


@contextmanager
def lockstep_ranks(tmp_path: Path, how: str, size: int = 2, odd_rank: int = 1) -> Iterator[Job]:
    entry = ("-m", "tests.support.lockstep", "--how", how, "--odd-rank", str(odd_rank))
    with start_ranks(tmp_path, EngineConfig(), world_size=size, entry=entry) as job:
        yield job


@contextmanager
def streaming(cache: Path, run_dir: Path) -> Iterator[tuple[Job, Beside]]:
    with referee(run_dir) as beside, start_ranks(run_dir, streaming_config(cache)) as job:
        job.wait_for(lambda: job.reached(1, "leave B", 1), "chunk 1 on rank 1")
        yield job, beside


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("how", "kind", "fm"), [(signal.SIGKILL, "lost", "FM-40"), (signal.SIGSTOP, "frozen", "FM-41")]
)
def test_a_rank_killed_or_stopped_in_mid_stream_is_named_and_the_job_is_gone(
    how: signal.Signals, kind: str, fm: str, victim: int, weights_cache: Path, tmp_path: Path
) -> None:
    with streaming(weights_cache, tmp_path) as (job, beside):
        since = time.monotonic()
        job.processes[victim].send_signal(how)
        gone_s = gone_after(job, since, 60)
        assert beside.leave() == 1
        record = beside.record
    print(f"{kind}: gone after {gone_s:.3f} s, {record and record['times']}")  # shown by -rP
    assert record is not None
    assert (record["verdict"]["kind"], record["verdict"]["fm"]) == (kind, fm)
    assert record["verdict"]["triggers"] == [victim]
    assert record["verdict"]["victims"] == [1 - victim]
    assert [seat["rank"] for seat in record["ranks"]] == [0, 1]
    assert record["ranks"][victim]["last"]["group"] == "mesh_pg"
    assert record["times"]["decided_to_all_gone_ms"] is not None
    assert gone_s < GONE_S
    assert f"rank {victim}" in beside.said


def test_an_idle_rank_that_is_stopped_is_named(weights_cache: Path, tmp_path: Path) -> None:
    """Stopped outside every collective, and before the stream: here, while it loads or joins."""
    with (
        referee(tmp_path) as beside,
        start_ranks(tmp_path, streaming_config(weights_cache), ranks=[1], port=None) as job,
    ):
        # Rank 0 is never started: rank 1 waits at the meeting point, in no collective.
        job.wait_for((tmp_path / "ranks" / "rank1.blackbox").exists, "the black box of rank 1")
        since = time.monotonic()
        job.processes[1].send_signal(signal.SIGSTOP)
        gone_s = gone_after(job, since, 60)
        assert beside.leave() == 1
    print(f"frozen, idle: gone after {gone_s:.3f} s")
    assert gone_s < GONE_S
    assert beside.record is not None
    assert beside.record["verdict"]["kind"] == "frozen"
    assert beside.record["verdict"]["triggers"] == [1]
    assert beside.record["unseen"] == [0]


def test_an_extra_collective_is_named_with_both_lines(tmp_path: Path) -> None:
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, "extra") as job:
        assert beside.leave(60) == 1
        gone_after(job, time.monotonic(), GONE_S)
    assert beside.record is not None
    verdict = beside.record["verdict"]
    assert (verdict["kind"], verdict["fm"]) == ("mismatch", "FM-03")
    assert (verdict["blame"], verdict["triggers"]) == ("difference", [])
    assert f"rank 0 all_reduce float32[8] at {line_of('planned')} (chunk 20, call 20)" in verdict["message"]
    assert f"rank 1 all_gather int64[3] at {line_of('planted: extra')} (chunk 20, call 20)" in verdict["message"]
    assert [seat["entered"]["place"] for seat in beside.record["ranks"]] == [21, 21]


@pytest.mark.parametrize("odd_rank", [0, 1, 2])
def test_of_three_ranks_the_odd_one_is_convicted(odd_rank: int, tmp_path: Path) -> None:
    with referee(tmp_path, (0, 1, 2)) as beside, lockstep_ranks(tmp_path, "extra", 3, odd_rank):
        assert beside.leave(60) == 1
    assert beside.record is not None
    assert beside.record["verdict"]["kind"] == "mismatch"
    assert beside.record["verdict"]["triggers"] == [odd_rank]
    assert beside.record["verdict"]["victims"] == [rank for rank in range(3) if rank != odd_rank]


def test_a_wrong_group_is_named_with_both_lines(tmp_path: Path) -> None:
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, "wrong-group"):
        assert beside.leave(60) == 1
    assert beside.record is not None
    verdict = beside.record["verdict"]
    assert (verdict["kind"], verdict["fm"]) == ("deadlock", "FM-22")
    assert f"number 21 of mesh_pg, at {line_of('planned')}" in verdict["message"]
    assert f"number 1 of world_pg, at {line_of('planted: wrong group')}" in verdict["message"]


def test_a_rank_that_finishes_early_is_named_as_absent(tmp_path: Path) -> None:
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, "leave"):
        assert beside.leave(60) == 1
    assert beside.record is not None
    assert beside.record["verdict"]["kind"] == "left"
    assert "rank 1 finished without entering it" in beside.record["verdict"]["message"]


@pytest.mark.parametrize("how", ["extra", "wrong-group"])
def test_without_the_referee_the_same_script_hangs(how: str, tmp_path: Path) -> None:
    """The proof that the referee, and not luck, ended the jobs above."""
    with lockstep_ranks(tmp_path, how) as job:
        boxes = [tmp_path / "ranks" / f"rank{rank}.blackbox" for rank in range(2)]
        job.wait_for(lambda: all(waits_at_the_odd_round(box) for box in boxes), "both ranks wait", 60)
        for process in job.processes.values():
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        assert all(waits_at_the_odd_round(box) for box in boxes)


def waits_at_the_odd_round(path: Path) -> bool:
    from engine.blackbox import read_box

    inside = read_box(path).inside if path.exists() else None
    return inside is not None and inside.chunk_index == lockstep.ODD_ROUND


@pytest.mark.parametrize("how", ["fine", "slow"])
def test_a_healthy_job_gets_no_verdict(how: str, tmp_path: Path) -> None:
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, how) as job:
        outcome = job.end(90)
        assert beside.leave() == 0
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert beside.record is None
    assert beside.said == ""


def test_a_healthy_stream_and_its_drain_get_no_verdict(weights_cache: Path, tmp_path: Path) -> None:
    """Joining, loading, warming, streaming, and an end in which ranks leave one after the other."""
    with streaming(weights_cache, tmp_path) as (job, beside):
        job.processes[0].send_signal(signal.SIGTERM)
        outcome = job.end(60)
        assert beside.leave() == 0
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert beside.record is None


def test_a_dead_referee_leaves_the_job_alone(tmp_path: Path) -> None:
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, "slow") as job:
        job.wait_for((tmp_path / "ranks" / "rank1.blackbox").exists, "the ranks run")
        beside.process.kill()
        outcome = job.end(90)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert beside.record is None


def test_a_box_of_an_earlier_job_in_the_same_directory_is_not_judged(tmp_path: Path) -> None:
    with lockstep_ranks(tmp_path, "fine") as job:
        job.wait_for((tmp_path / "ranks" / "rank1.blackbox").exists, "rank 1 began")
        job.processes[0].kill()
        job.processes[1].kill()
    with referee(tmp_path) as beside, lockstep_ranks(tmp_path, "fine") as job:
        outcome = job.end(90)
        assert beside.leave() == 0
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert beside.record is None


def test_a_damaged_box_is_unknown_and_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for rank in range(2):
        (tmp_path / "ranks" / f"rank{rank}.blackbox").write_bytes(b"TPCTLBB1" + b"\xff" * 5000)
    with referee(tmp_path) as beside:
        end = time.monotonic() + 20
        while beside.said.count("has black box version") < 2:
            assert time.monotonic() < end, beside.said
        beside.process.terminate()
        assert beside.leave() == 0
    assert beside.record is None
