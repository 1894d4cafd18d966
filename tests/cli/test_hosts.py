"""One job over two hosts, each a network namespace of this machine with a state directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.process import Process
from tests.cli.conftest import validated
from tests.cli.jobs import in_state, sets, tag_of, until
from tpctl.drill.host import LINK
from tpctl.drill.twohosts import ADDRESSES, why_not
from tpctl.launch.local import tagged

NAME = "two"
# The host that leads has the later address: ranks go by node rank, not by what hosts are called.
WHERE = tuple(reversed(ADDRESSES))
TWO = ("plan.tp=2", "liveness.phase_budget_s=8", "liveness.watchdog_s=8")


class Host:
    """A network namespace that lives as long as its first process, and the jobs that are started in it."""

    def __init__(self, number: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.state = number, root / f"host{number}"
        self._monkeypatch = monkeypatch
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()  # it runs, so it is in its namespace

    @property
    def pid(self) -> int:
        return self._holder.pid

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), "--net", *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"TPCTL_STATE_DIR": str(self.state), "GLOO_SOCKET_IFNAME": LINK},
        )

    def up(self, *more: str) -> None:
        where = ["--nnodes", "2", "--node-rank", str(self.number), "--rdzv", f"{WHERE[0]}:29400"]
        started = self.run(sys.executable, "-m", "tpctl", "up", "--name", NAME, *where, *sets(*TWO), *more)
        assert started.returncode == 0, started.stderr

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Commands of the body find this host's jobs: files and signals know no network."""
        with self._monkeypatch.context() as patch:
            patch.setenv("TPCTL_STATE_DIR", str(self.state))
            yield

    def until(self, cli, condition: Callable[[dict], bool], what: str) -> dict:
        with self.here():
            return until(cli, NAME, condition, what)

    def lose(self) -> None:
        """Everything of it ends at once."""
        record = json.loads((self.state / "jobs" / NAME / "job.json").read_text())
        Process.from_dict(record["supervisor"]).send(signal.SIGKILL)
        for pid in tagged(record["attempts"][-1]["tag"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        if (self.state / "jobs" / NAME / "job.json").exists():
            self.lose()
        self._holder.kill()
        self._holder.communicate()


@pytest.fixture
def hosts(tmp_path, monkeypatch, weights_cache):
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("TPCTL_MODEL_CACHE_DIR", str(weights_cache))
    with contextlib.ExitStack() as stack:
        both = []
        for number in (0, 1):
            both.append(Host(number, tmp_path, monkeypatch))
            stack.callback(both[-1].close)
        first, second = (str(host.pid) for host in both)
        link = ["link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second]
        subprocess.run(["ip", *link], check=True)
        for host, address in zip(both, WHERE, strict=True):
            for words in (f"address add {address}/24 dev {LINK}", "link set lo up", f"link set {LINK} up"):
                assert host.run("ip", *words.split()).returncode == 0
        for host in both:
            host.up()
        yield both


def test_a_job_over_two_hosts_is_seen_on_both_and_drained_on_the_first(hosts, cli):
    first, second = hosts
    leading = first.until(cli, lambda data: (data["emitted"] or 0) >= 2, "two chunks")
    assert ([rank["rank"] for rank in leading["ranks"]], leading["nnodes"], leading["node_rank"]) == ([0], 2, 0)
    assert (leading["state"], leading["verdict"]) == ("running", "PASS")
    following = second.until(cli, in_state("running", "wedged"), "its ranks")
    assert ([rank["rank"] for rank in following["ranks"]], following["node_rank"]) == ([1], 1)
    assert (following["state"], following["verdict"], following["emitted"]) == ("running", "PASS", None)
    with second.here():
        for refused in (cli("drain", NAME), cli("prompt", NAME, "a fox"), cli("restart", NAME)):
            assert refused.exit_code == 2
            assert "TP-8056" in refused.stderr
            assert WHERE[0] in refused.stderr
        assert cli("bundle", NAME, "--out", "second.tar.gz").exit_code == 0
    # A cluster tells all hosts at once; those that follow wait for the first.
    os.kill(following["supervisor_pid"], signal.SIGTERM)
    assert second.until(cli, in_state("draining", "aborted", "drained", "failed"), "the drain")["state"] == "draining"
    assert first.until(cli, lambda data: True, "a look")["state"] == "running"
    with first.here():
        done = cli("drain", NAME, "-o", "json")
        assert done.exit_code == 0, done.stdout + done.stderr
        receipt = validated(done.stdout)["data"]
        assert (receipt["ending"], receipt["balanced"], receipt["leftovers"]) == ("drained", True, [])
        assert receipt["account"]["accepted"] == receipt["account"]["emitted"] >= 2
        assert receipt["exit_codes"] == {"0": 0}
    over = second.until(cli, in_state("drained", "finished", "failed", "aborted", "lost"), "its end")
    assert over["state"] == "drained"
    with second.here():
        assert json.loads((second.state / "jobs" / NAME / "attempts/0/ranks/rank1.json").read_text())["exit_code"] == 0
        assert tagged(tag_of(second.state / "jobs", NAME)) == []


def test_when_a_host_is_lost_the_other_ends_and_says_so(hosts, cli):
    first, second = hosts
    first.until(cli, lambda data: (data["emitted"] or 0) >= 1, "the first chunk")
    assert first.run("ip", "link", "set", LINK, "down").returncode == 0
    second.lose()  # nothing of it says good-bye: the link is down already
    over = first.until(cli, in_state("failed", "aborted", "lost", "drained"), "the end of the other side")
    assert over["state"] == "failed"
    assert over["verdict"] == "FAIL"
    (attempt,) = over["attempts"]
    assert "FM-40" in attempt["reason"], attempt
    assert tagged(tag_of(first.state / "jobs", NAME)) == []
    lost = second.until(cli, in_state("lost"), "its loss")
    assert lost["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--nnodes 2 --name x", "TP-8050"),
        ("--nnodes 2 --rdzv h:29400", "TP-8050"),
        ("--node-rank 1 --name x", "TP-8050"),
        ("--rdzv h:29400 --name x", "TP-8050"),
        ("--nnodes 3 --name x --rdzv h:29400", "TP-8051"),
        ("--nnodes 2 --name x --rdzv h:29400 --set plan.tp_plan=pp1", "TP-8052"),
        ("--nnodes 2 --name x --rdzv h:29400 --node-rank 2", "TP-8053"),
        ("--nnodes 2 --name x --rdzv h:29400 --restart on-failure", "TP-8054"),
        ("--nnodes 2 --name x --rdzv h:0", "TP-8055"),
        ("--nnodes 2 --name x --rdzv nonsense", "TP-7103"),
    ],
)
def test_hosts_that_could_never_meet_are_refused(words, code, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TPCTL_STATE_DIR", str(tmp_path / "st"))
    refused = cli("up", *words.split(), "--set", "plan.tp=2")
    assert refused.exit_code in (2, 3)
    assert code in refused.stderr, refused.stderr
    assert not (tmp_path / "st").exists()
