"""Watching a real job: its logs in one order, live and afterwards; top; a timeline while it runs."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.log import log_path
from tests.cli.conftest import validated
from tests.cli.jobs import DEADLINE_S, data_of, in_state, nap, sets, state, until
from tests.support.traces import problems

__all__ = ["state"]
COMMAND = [sys.executable, "-m", "tpctl"]


@pytest.fixture
def start():
    """Starts a command beside the test; whatever still runs at its end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> list[dict]:
    """The JSON lines of a command that ends by itself."""
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def in_order(records: list[dict]) -> None:
    """No two lines of one rank swapped, and one clock over all of them."""
    for rank in (0, 1):
        seqs = [r["seq"] for r in records if r["origin"] == "rank" and r["rank"] == rank]
        assert seqs == sorted(set(seqs))
        assert len(seqs) > 5
    clock = [r["mono_ns"] for r in records if r["mono_ns"] is not None]
    assert clock == sorted(clock)


def test_a_job_is_watched_from_its_start_to_its_drain(cli, state, start):
    assert cli("up", "--name", "one", *sets("plan.tp_plan=pp0", "log.level=debug")).exit_code == 0
    following, watching = (
        start("logs", "one", "-f", "-o", "jsonl"),
        start("top", "one", "-o", "jsonl", "--interval", "0.2"),
    )
    leaving = start("logs", "one", "-f")
    until(cli, "one", lambda data: (data["emitted"] or 0) >= 4, "four chunks")
    assert cli("prompt", "one", "a red fox").exit_code == 0

    here = validated(cli("logs", "one", "-o", "json").stdout)
    assert here["verdict"] == "PASS"
    assert here["coverage"] == {"checked": 2, "expected": 2}
    in_order(here["data"]["records"])
    applied = [r for r in here["data"]["records"] if r["event"] == "control"]
    assert [(r["rank"], r["data"]["changes"]) for r in applied] == [(0, ["prompt"])]
    assert "a red fox" not in cli("logs", "one").stdout  # what was asked for is the operator's

    once = cli("top", "--once")
    assert once.exit_code == 0, once.stdout
    assert max(map(len, once.stdout.splitlines())) <= 80
    (job,) = validated(cli("top", "-o", "json").stdout)["data"]["jobs"]
    assert (job["name"], job["state"], job["coverage"]) == ("one", "running", {"checked": 2, "expected": 2})
    assert [rank["commitment"] is not None for rank in job["ranks"]] == [True, True]

    live = cli("timeline", "one", "--out", "live.json", "--svg", "live.svg", "-o", "json")
    assert live.exit_code == 0, live.stdout
    said = validated(live.stdout)
    assert said["verdict"] == "WARN"
    assert said["data"]["alive"]
    assert said["data"]["ranks"][0]["chunks"] >= 4
    assert problems(json.loads(Path("live.json").read_text())) == []
    assert "OverlapScore" in Path("live.svg").read_text()

    assert leaving.stdout is not None
    assert any("rank 0      state: from now on running" in line for line in leaving.stdout)  # it follows
    leaving.send_signal(signal.SIGINT)
    leaving.communicate(timeout=DEADLINE_S)
    assert leaving.returncode == 130

    assert cli("drain", "one").exit_code == 0
    *records, envelope = end(following)
    assert {r.pop("kind") for r in records} == {"log"}
    in_order(records)
    whole = validated(json.dumps({key: value for key, value in envelope.items() if key != "kind"}))
    assert whole["data"]["shown"] == len(records)
    assert "the job is over: drained" in records[-1]["message"]
    after = data_of(cli, "logs", "one")["records"]
    assert [r for r in records if r["origin"] == "rank"] == [r for r in after if r["origin"] == "rank"]
    assert [(r["rank"], r["data"]["signal"]) for r in after if r["event"] == "signal"][:1] == [(0, "SIGTERM")]

    *looks, last = end(watching)
    assert looks
    assert looks[0]["jobs"][0]["name"] == last["data"]["jobs"][0]["name"] == "one"
    assert last["data"]["jobs"][0]["state"] == "drained"

    few = data_of(cli, "logs", "one", "--rank", "1", "--level", "info", "-n", "2")["records"]
    assert [(r["rank"], r["message"]) for r in few] == [(1, "from now on shutdown"), (1, "from now on exited")]
    assert data_of(cli, "logs", "one", "--level", "error")["records"] == []
    assert data_of(cli, "logs", "one", "--since", "2099-01-01T00:00:00Z")["records"] == []
    assert len(data_of(cli, "logs", "one", "--since", "1d")["records"]) == len(after)
    for args, code, exit_code in (
        (("--rank", "5"), "TP-7811", 2),
        (("--since", "yesterday"), "TP-7810", 2),
        (("--attempt", "3"), "TP-7804", 7),
        (("--level", "loud"), "'debug', 'info', 'warning', 'error'", 2),
    ):
        wrong = cli("logs", "one", *args)
        assert (wrong.exit_code, code in wrong.stderr) == (exit_code, True), wrong.stderr
    with log_path(state / "one" / "attempts" / "0", 1).open("a") as stream:
        stream.write("no json\n")
    damaged = cli("logs", "one", "-o", "json")
    assert damaged.exit_code == 5
    assert validated(damaged.stdout)["findings"][0]["where"] == "rank 1"


def test_a_killed_rank_and_the_verdict_on_it_have_their_place(cli, state):
    assert cli("up", "--name", "two", *sets("plan.tp=2")).exit_code == 0
    first = until(cli, "two", lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    os.kill(first["ranks"][1]["pid"], signal.SIGKILL)
    until(cli, "two", in_state("failed"), "the end")
    records = data_of(cli, "logs", "two", "--level", "warning")["records"]
    (verdict,) = [r for r in records if r["origin"] == "referee"]
    assert verdict["data"]["triggers"] == [1]
    told = [r["origin"] for r in records]
    assert told.index("referee") < told.index("launcher") < len(told) - 1
    assert told[-1] == "supervisor"
    drawn = cli("timeline", "two", "--out", "two.json")
    assert "TP-" not in drawn.stderr
    assert problems(json.loads(Path("two.json").read_text())) == []


def test_top_on_a_terminal_goes_on_until_it_is_interrupted(cli, state):
    """A real terminal, 80 columns wide: it is drawn more than once, and Ctrl-C ends it with 130."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [*COMMAND, "top", "--interval", "0.1"], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    seen, deadline = b"", time.monotonic() + DEADLINE_S
    try:
        while seen.count(b"Ctrl-C leaves") < 3:
            assert time.monotonic() < deadline, seen
            seen += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            assert time.monotonic() < deadline, seen
            try:
                seen += os.read(leader, 65536)  # until the other end is closed
            except OSError:
                nap.wait(0.05)
    finally:
        process.kill()
        os.close(leader)
    assert process.wait(10) == 130
    assert b"no job runs here" in seen


def test_top_of_an_unknown_job_and_of_one_that_cannot_be_read(cli, state):
    assert cli("top", "nobody").exit_code == 7
    (state / "odd").mkdir(mode=0o700, parents=True)
    (state / "odd" / "job.json").write_text("{")
    seen = cli("top", "-o", "json")
    assert seen.exit_code == 5
    assert validated(seen.stdout)["data"]["jobs"][0]["state"] == "unknown"
