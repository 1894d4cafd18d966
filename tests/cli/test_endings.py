"""Jobs ended from outside: drained under load, aborted at a deadline, aborted at once; each receipt balances."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

from engine.config import EngineConfig
from engine.lifecycle import Doing
from engine.process import Process
from tests.cli.conftest import validated
from tests.cli.jobs import DEADLINE_S, data_of, nap, sets, state, tag_of, until
from tpctl.jobs import place, start
from tpctl.jobs.observe import observe
from tpctl.jobs.record import JobRecord
from tpctl.launch.local import tagged

__all__ = ["state"]


def started(cli, name: str, *more: str) -> None:
    assert cli("up", "--name", name, "--no-referee", *sets(*more)).exit_code == 0
    until(cli, name, lambda data: (data["emitted"] or 0) >= 2, "two chunks")


def test_a_drain_under_load_loses_nothing_and_its_receipt_says_so(cli, state):
    started(cli, "load", "plan.tp_plan=pp0")
    planned = validated(cli("drain", "load", "--dry-run", "-o", "json").stdout)["data"]
    assert planned["dry_run"]
    assert planned["ending"] is None
    assert len(planned["blockers"]) == 2
    assert data_of(cli, "status", "load")["state"] == "running"

    pid = data_of(cli, "status", "load")["ranks"][1]["pid"]
    a_drain_is_taken_back_on_demand(cli, "load", pid)
    a_drain_is_taken_back_at_its_deadline(cli, "load", pid)

    done = cli("drain", "load", "-o", "json")
    assert done.exit_code == 0, done.stdout
    receipt = validated(done.stdout)["data"]
    account = receipt["account"]
    assert account["accepted"] == account["emitted"] >= 2
    assert receipt["balanced"]
    assert receipt["exit_codes"] == {"0": 0, "1": 0}
    assert [phase["name"] for phase in receipt["phases"]] == ["in flight", "draining", "shutdown", "exited"]
    moments = [phase["t_s"] for phase in receipt["phases"]]
    assert moments == sorted(moments)
    assert moments[0] == 0
    assert moments[-1] < 30
    assert [phase["budget_s"] for phase in receipt["phases"]] == [21.0, 4.5, 4.5, None]
    assert receipt["leftovers"] == receipt["blockers"] == receipt["abandoned_chunks"] == []

    late = cli("drain", "load", "--cancel")
    assert late.exit_code == 3
    assert "cannot be taken back: it is over: drained" in late.stderr
    again = cli("drain", "load", "-o", "json")
    assert again.exit_code == 0
    assert validated(again.stdout)["data"] == receipt
    assert cli("wait", "load", "--for", "drained").exit_code == 0
    never = cli("wait", "load", "--for", "running", "-o", "json")
    assert never.exit_code == 3
    assert validated(never.stdout)["data"]["waited_s"] < 5


def stop_the_mesh(name: str, pid: int) -> None:
    """Stop its one rank, and wait until rank 0 waits for it and nothing else: a drain is then before its point of no
    return. A chunk of this size takes the mesh some milliseconds."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE_S
    while True:
        seen = observe(place.find(name))
        stream = seen.ranks[0].stream
        if stream is not None and stream.doing is Doing.MESH and seen.now_ns - stream.doing_ns > 1e9:
            return
        assert time.monotonic() < end
        nap.wait(0.02)


def a_drain_is_taken_back_on_demand(cli, name: str, pid: int) -> None:
    """A mesh that is stopped keeps the drain from its point of no return."""
    nobody = cli("drain", name, "--cancel")
    assert nobody.exit_code == 3
    assert "no drain is under way" in nobody.stderr
    assert "TP-7855" in cli("drain", name, "--cancel", "--deadline", "3").stderr
    stop_the_mesh(name, pid)
    command = [sys.executable, "-m", "tpctl", "drain", name, "-o", "json"]
    asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + DEADLINE_S
    while JobRecord.read(place.find(name).record).draining is None:
        assert time.monotonic() < end
        nap.wait(0.02)
    cancelled = cli("drain", name, "--cancel")
    assert cancelled.exit_code == 0, cancelled.stderr
    said, _ = asked.communicate(timeout=DEADLINE_S)
    assert asked.returncode == 3
    receipt = validated(said.decode())["data"]
    assert receipt["taken_back"]
    assert receipt["ending"] is None
    assert receipt["account"]["accepted"] == receipt["account"]["emitted"] + receipt["account"]["in_flight"]
    os.kill(pid, signal.SIGCONT)
    assert data_of(cli, "prompt", name, "it goes on")["state"] == "shown"


def a_drain_is_taken_back_at_its_deadline(cli, name: str, pid: int) -> None:
    stop_the_mesh(name, pid)
    done = cli("drain", name, "--deadline", "0.5", "--on-deadline", "resume", "-o", "json")
    assert done.exit_code == 6, done.stdout
    receipt = validated(done.stdout)["data"]
    assert receipt["taken_back"]
    assert "blocked by rank 1: running, stopped by a signal" in receipt["why"]
    assert "in flight takes longer than its 0.35 s; rank 1" in done.stderr
    left = cli("drain", name, "--deadline", "0.5", "--on-deadline", "fail", "-o", "json")
    assert left.exit_code == 6, left.stdout
    receipt = validated(left.stdout)["data"]
    assert (receipt["ending"], receipt["taken_back"]) == (None, False)
    assert [(one["rank"], one["stopped"]) for one in receipt["blockers"]] == [(1, True), (0, False)]
    assert cli("drain", name, "--cancel").exit_code == 0
    os.kill(pid, signal.SIGCONT)
    assert data_of(cli, "prompt", name, "and on")["state"] == "shown"


def test_a_wedged_job_is_aborted_at_the_deadline_which_its_receipt_says(cli, state):
    started(cli, "stuck", "plan.tp=2")
    frozen = data_of(cli, "status", "stuck")["ranks"][1]["pid"]
    a_drain_is_taken_back_on_demand(cli, "stuck", frozen)
    os.kill(frozen, signal.SIGSTOP)
    assert cli("wait", "stuck", "--for", "wedged", "--timeout", "20").exit_code == 0
    assert cli("wait", "stuck", "--for", "drained", "--fail-on", "wedged", "--timeout", "20").exit_code == 3
    assert cli("wait", "stuck", "--for", "drained", "--timeout", "0.2").exit_code == 6
    well = cli("status", "stuck")
    assert well.exit_code == 3
    assert "rank 1 is stopped by a signal" in well.stdout + well.stderr

    command = [sys.executable, "-m", "tpctl", "drain", "stuck", "--deadline", "6", "-o", "json"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + DEADLINE_S
    while not json.loads((state / "stuck" / "job.json").read_text())["draining"]:
        assert time.monotonic() < end
        nap.wait(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 130, said
    assert b"the drain of stuck goes on" in said

    done = cli("drain", "stuck", "--deadline", "20", "-o", "json")
    assert done.exit_code == 6, done.stdout
    assert "attached" in done.stderr
    receipt = validated(done.stdout)["data"]
    assert receipt["ending"] == "aborted"
    assert receipt["deadline_s"] == 6
    assert "longer than 6 s; blocked by rank 1: running, stopped by a signal" in receipt["why"]
    assert receipt["phases"][0]["late"]
    assert receipt["phases"][-1]["name"] == "aborted"
    account = receipt["account"]
    assert receipt["balanced"]
    assert account["accepted"] == account["emitted"] + account["abandoned"]
    assert receipt["abandoned_chunks"] == [account["accepted"] - 1]
    assert receipt["leftovers"] == []
    assert tagged(tag_of(state, "stuck")) == []


def test_an_abort_asks_first_and_ends_everything(cli, state):
    started(cli, "brief")
    asked = cli("abort", "brief")
    assert asked.exit_code == 2
    assert "TP-7622" in asked.stderr
    assert validated(cli("abort", "brief", "--dry-run", "-o", "json").stdout)["data"]["ending"] is None
    assert data_of(cli, "status", "brief")["state"] == "running"
    done = cli("abort", "brief", "--yes", "-o", "json")
    receipt = validated(done.stdout)["data"]
    assert done.exit_code == (8 if receipt["abandoned_chunks"] else 0), done.stdout
    assert receipt["ending"] == "aborted"
    assert receipt["balanced"]
    assert receipt["leftovers"] == []
    assert tagged(tag_of(state, "brief")) == []


def test_a_deadline_that_the_ranks_would_not_keep_is_refused(cli, state):
    assert cli("up", "--name", "late", *sets("liveness.drain_deadline_s=5")).exit_code == 0
    refused = cli("drain", "late", "--deadline", "60")
    assert refused.exit_code == 2
    assert "TP-7620" in refused.stderr
    done = cli("drain", "late", "-o", "json")
    assert done.exit_code == 0, done.stdout
    receipt = validated(done.stdout)["data"]
    assert receipt["ending"] == "drained"
    assert (receipt["account"] or {"accepted": 0})["accepted"] == 0
    assert receipt["leftovers"] == []


def test_a_restart_drains_first_and_keeps_what_the_attempt_before_it_left(cli, state):
    started(cli, "again")
    before = data_of(cli, "status", "again")
    said = validated(cli("restart", "again", "-o", "json").stdout)["data"]
    assert said["ending"] == "drained"
    assert said["account"]["accepted"] == said["account"]["emitted"] >= 2
    assert said["attempt"] == 1
    assert said["job_id"] != before["job_id"]
    now = until(cli, "again", lambda data: data["state"] == "running" and data["emitted"], "chunks again")
    assert [attempt["number"] for attempt in now["attempts"]] == [0, 1]
    assert now["restarts"] == 0
    assert (state / "again" / "attempts" / "0" / "ranks" / "rank0.json").exists()
    assert cli("drain", "again").exit_code == 0

    started_anew = cli("restart", "again", "--no-referee", "-o", "json")  # of a job that is over
    assert started_anew.exit_code == 0, started_anew.stderr
    assert validated(started_anew.stdout)["data"]["attempt"] == 2
    assert cli("drain", "again").exit_code == 0


def test_what_a_lost_job_left_is_named_and_buried_by_an_abort(cli, state):
    job = place.make("lost")
    record = start.freeze(job, EngineConfig(), "no", 0)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    replace(record, supervisor=Process(gone.pid, 1)).write(job.record)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(job.socket))
    assert data_of(cli, "status", "lost")["state"] == "lost"
    unheard = cli("cut", "lost")
    assert unheard.exit_code == 7
    assert "does not listen" in unheard.stderr
    drained = cli("drain", "lost", "-o", "json")
    assert drained.exit_code == 3
    assert validated(drained.stdout)["data"]["leftovers"] == [f"socket {job.socket}"]
    buried = validated(cli("abort", "lost", "--yes", "-o", "json").stdout)["data"]
    assert (buried["ending"], buried["leftovers"]) == ("lost", [])
