"""Deadlines fire from outside the main thread, and only when they should."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from engine.lifecycle import RankExit
from engine.watchdog import Deadline, Heartbeat, Watchdog

SCRIPT = """
import os, sys, time
from engine.lifecycle import RankExit
from engine.watchdog import Watchdog
dog = Watchdog(lambda deadline: os._exit(int(deadline.exit_code)))
with dog.budget("a wait", 0.2, RankExit.ORPHANED):
    {stuck}
os._exit(9)
"""


@pytest.mark.parametrize("stuck", ["import threading; threading.Event().wait(30)", "while True: pass"])
def test_it_ends_a_stuck_process(stuck: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(stuck=stuck)], timeout=25, check=False)
    assert done.returncode == RankExit.ORPHANED


def test_a_budget_kept_never_fires() -> None:
    fired: list[Deadline] = []
    dog = Watchdog(fired.append)
    for _ in range(200):
        with dog.budget("phase B", 30.0, RankExit.PHASE_BUDGET):
            pass
    dog.close()
    assert fired == []


def test_the_earliest_of_several_deadlines_fires_first() -> None:
    fired: list[str] = []
    done = threading.Event()

    def expired(deadline: Deadline) -> None:
        fired.append(deadline.name)
        if len(fired) == 2:
            done.set()

    dog = Watchdog(expired)
    dog.arm("later", 0.2, RankExit.PHASE_BUDGET)
    dog.arm("sooner", 0.05, RankExit.ORPHANED)
    dog.arm("never", 60.0, RankExit.ORPHANED)
    assert done.wait(20)
    dog.close()
    assert fired == ["sooner", "later"]


def test_the_heartbeat_keeps_out_while_the_owner_is_busy() -> None:
    beats: list[bool] = []
    beaten = threading.Event()

    def beat() -> None:
        beats.append(heartbeat.busy.locked())
        beaten.set()

    heartbeat = Heartbeat(0.01, beat)
    with heartbeat.hold():
        heartbeat.start()
        assert not beaten.wait(0.2), "a beat came while the owner was busy"
    assert beaten.wait(20)
    heartbeat.stop()
    count = len(beats)
    assert not threading.Event().wait(0.05)
    assert len(beats) == count
    assert all(beats), "a beat must hold the lock that keeps the owner out"


def test_a_failed_beat_is_kept_for_the_owner() -> None:
    failed = threading.Event()

    def beat() -> None:
        failed.set()
        raise ValueError("the peer is gone")

    heartbeat = Heartbeat(0.01, beat)
    heartbeat.start()
    assert failed.wait(20)
    heartbeat.stop()
    assert isinstance(heartbeat.failure, ValueError)


def test_no_beat_follows_a_phase_that_failed() -> None:
    """Its peers may still be in the middle of it: a header would meet them in another collective."""
    beaten = threading.Event()
    heartbeat = Heartbeat(0.01, beaten.set)

    def fail() -> None:
        with heartbeat.hold():
            heartbeat.start()
            raise ValueError("phase B failed")

    with pytest.raises(ValueError, match="phase B"):
        fail()
    assert not beaten.wait(0.2)
    heartbeat.stop()
