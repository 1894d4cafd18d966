"""How a real job ends: idle and calm, orphaned, over budget, drained by a signal, aborted by a second one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from engine.config import EngineConfig, from_dict
from tests.support.ranks import Job, start_ranks

PLANTS = "tests.cpu.plants:"


def make_config(cache: Path, **dotted: object) -> EngineConfig:
    base = {
        "model": {"cache_dir": str(cache)},
        "geometry": {"height": 32, "width": 32},
        "plan": {"tp": 2},
        "run": {"chunks": 10_000},
        "sink": {"kinds": ["null"]},
        "liveness": {"heartbeat_s": 0.2, "watchdog_s": 2.0, "phase_budget_s": 3.0},
    }
    return from_dict(base).replace(**dotted)


def streaming(job: Job, chunk_index: int = 1) -> None:
    job.wait_for(lambda: job.reached(1, "leave B", chunk_index), f"chunk {chunk_index} on rank 1")


def test_sigterm_drains_and_the_account_balances(weights_cache: Path, tmp_path: Path) -> None:
    with start_ranks(tmp_path / "run", make_config(weights_cache)) as job:
        streaming(job)
        for process in job.processes.values():
            process.send_signal(signal.SIGTERM)
        outcome = job.end(60)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    account = outcome.reports[0]["account"]
    assert account["accepted"] == account["emitted"] + account["dropped"] + account["abandoned"]
    assert 2 <= account["emitted"] < 10_000
    assert account["abandoned"] == 0
    assert "SIGTERM: draining" in outcome.stderr[0]
    assert [event["data"]["signal"] for event in outcome.events(0, "signal")] == ["SIGTERM"]
    assert [event["data"]["state"] for event in outcome.events(1, "state")][-2:] == ["shutdown", "exited"]


def test_a_second_sigterm_aborts(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, liveness__phase_budget_s=600.0, liveness__drain_deadline_s=600.0)
    with start_ranks(tmp_path / "run", config) as job:
        streaming(job)
        # With its peer stopped, rank 0 cannot finish its chunk: only the second signal gets it out.
        job.processes[1].send_signal(signal.SIGSTOP)
        job.processes[0].send_signal(signal.SIGTERM)
        job.wait_for(lambda: "draining" in job.stderr()[0], "the drain began")
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.processes[0].wait(20) == 128 + signal.SIGTERM
        outcome = job.end(1)
    account = outcome.reports[0]["account"]
    assert account["accepted"] == account["emitted"] + account["dropped"] + account["abandoned"]
    assert outcome.reports[0]["error"]["code"] == "TP-6403"
    (error,) = outcome.events(0, "error")
    assert (error["level"], error["data"]["code"], error["data"]["exit_code"]) == ("error", "TP-6403", 143)


def test_a_frozen_peer_ends_phase_b_by_its_budget(weights_cache: Path, tmp_path: Path) -> None:
    with start_ranks(tmp_path / "run", make_config(weights_cache)) as job:
        streaming(job)
        job.processes[1].send_signal(signal.SIGSTOP)
        code = job.processes[0].wait(30)
        outcome = job.end(0.5)
    # Between two chunks it is a heartbeat that the stopped peer does not take.
    error = outcome.reports[0]["error"]
    assert (code, error["evidence"]["waited_in"]) in {(72, "phase B"), (74, "the heartbeat")}
    assert (error["fm"], error["evidence"]["stopped"], error["evidence"]["gone"]) == ("FM-41", [1], [])
    assert "rank 1 is stopped" in error["message"]


def test_a_frozen_leader_leaves_orphans_that_end_by_the_watchdog(weights_cache: Path, tmp_path: Path) -> None:
    with start_ranks(tmp_path / "run", make_config(weights_cache)) as job:
        streaming(job)
        job.processes[0].send_signal(signal.SIGSTOP)
        # Rank 1 waits for a header, or, if the leader was stopped in phase B, for its part of a collective.
        assert job.processes[1].wait(30) in (71, 72)
        job.end(0.5)


def test_a_killed_worker_ends_the_leader(weights_cache: Path, tmp_path: Path) -> None:
    with start_ranks(tmp_path / "run", make_config(weights_cache)) as job:
        streaming(job)
        job.processes[1].kill()
        # gloo may miss the end of a peer that it was about to send to; the budget of that wait ends the leader then.
        assert job.processes[0].wait(30) in (72, 74)
        outcome = job.end(1)
    assert outcome.reports[0]["error"]["fm"] == "FM-40"


@pytest.mark.parametrize(
    ("plant", "fm", "gone"),
    [("hear_of_no_end", "FM-40", [1]), ("know_no_neighbours", "FM-41", [])],
    ids=["neighbours", "without-guard"],
)
def test_a_backend_that_misses_an_end_does_not_make_it_a_freeze(
    plant: str, fm: str, gone: list[int], weights_cache: Path, tmp_path: Path
) -> None:
    """The leader waits in vain for a peer that is gone, and says so; all it knew before was that its wait was over."""
    with start_ranks(tmp_path / "run", make_config(weights_cache), plants={0: f"{PLANTS}{plant}"}) as job:
        streaming(job)
        job.processes[1].kill()
        assert job.processes[0].wait(30) in (72, 74)
        outcome = job.end(1)
    error = outcome.reports[0]["error"]
    assert (error["code"], error["fm"], error["evidence"]["gone"]) == ("TP-6402", fm, gone)
    assert ("rank 1 is gone" in error["message"]) == bool(gone)


def test_a_peer_that_left_by_an_error_of_its_own_is_not_lost(weights_cache: Path, tmp_path: Path) -> None:
    plants = {0: f"{PLANTS}hear_of_no_end", 1: f"{PLANTS}fail_in_phase_b"}
    with start_ranks(tmp_path / "run", make_config(weights_cache), plants=plants) as job:
        assert job.processes[1].wait(60) == 70
        assert job.processes[0].wait(30) in (72, 74)
        outcome = job.end(1)
    error = outcome.reports[0]["error"]
    assert (error["code"], error["fm"], error["evidence"]["gone"]) == ("TP-6402", "FM-41", [])
    assert "rank 1 left with 70" in error["message"]


SLOW_SINK = """
import os, sys, threading
from engine.sinks import null
from engine.watchdog import Heartbeat
write = null.NullSink.write
def slow(self, *arguments):
    threading.Event().wait(5.0)
    write(self, *arguments)
null.NullSink.write = slow
{guard}
from engine.worker import main
os._exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("guard", "exit_codes"),
    [("", {0: 0, 1: 0}), ("Heartbeat._run = lambda self: None", {0: 74, 1: 71})],
    ids=["heartbeat", "without-guard"],
)
def test_a_slow_sink_never_ends_a_healthy_job(
    guard: str, exit_codes: dict[int, int], weights_cache: Path, tmp_path: Path
) -> None:
    """Rank 0 is in its sink for more than two watchdogs. Heartbeats keep the worker; without them it is orphaned."""
    config = make_config(weights_cache, run__chunks=2)
    entry = ("-c", SLOW_SINK.format(guard=guard))
    with start_ranks(tmp_path / "run", config, entry=entry) as job:
        outcome = job.end(60)
    assert outcome.exit_codes == exit_codes, outcome.stderr
    if not guard:
        assert outcome.reports[0]["account"]["emitted"] == 2
