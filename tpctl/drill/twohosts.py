"""A drill over two hosts: two network namespaces on this machine, one link between them, a launcher in each.

Nothing of it is kept by name: a namespace lives as long as a process in it, and the link as long as a namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.blackbox import BlackBoxError, read_box
from tpctl.drill.host import LINK
from tpctl.drill.judge import REFEREE_KILL, Result, Seen, find, judge
from tpctl.drill.ranks import Ended
from tpctl.errors import LaunchError
from tpctl.launch.environment import rank_environment
from tpctl.reports import read_reports
from tpctl.verdict import Finding, Verdict

HOSTS = 2
# The namespaces are cut off from every other network, so any address and any port are free.
ADDRESSES = ("10.201.0.1", "10.201.0.2")
ENDPOINT = f"{ADDRESSES[0]}:29400"
ANSWER_S = 20.0
START_S = 120.0
# What launchers get once their ranks are gone; past it they are ended, and that is a failure of the drill.
LEAVE_S = 15.0
POLL_S = 0.05


def why_not() -> str | None:
    """Why this machine cannot give two hosts; None if it can."""
    missing = [name for name in ("unshare", "ip") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (util-linux, iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", LINK, "type", "veth"], capture_output=True, text=True, check=False
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Over:
    """How a job over two hosts ended. Times are monotonic nanoseconds."""

    cut_ns: int = 0
    ended: Ended = field(default_factory=Ended)
    outcomes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    left_ms: float | None = None


class Host:
    """One namespace and the launcher in it."""

    def __init__(self, log: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-m", "tpctl.drill.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=rank_environment(),
            start_new_session=True,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid

    def ask(self, wanted: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(wanted + "\n")

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line.

        Raises:
            LaunchError: it is gone, or silent.
        """
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], timeout_s)[0] and (line := self._process.stdout.readline()):
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise LaunchError("a host of the drill does not answer; see hosts.log", code="TP-7108")

    def fileno(self) -> int:
        """Readable when there is an answer, so that hosts can be waited for together."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def end(self) -> None:
        """The end of its input is its order to end what it launched."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, ...]]:
    """Two hosts with a link between them that is not up yet. All is gone when the body ends."""
    with (directory / "hosts.log").open("wb") as log, contextlib.ExitStack() as stack:
        hosts = []
        for _ in range(HOSTS):
            hosts.append(Host(log))
            stack.callback(hosts[-1].end)
        for host in hosts:
            host.answer(ANSWER_S)  # it runs, so it is in its namespace
        first, second = (str(host.pid) for host in hosts)
        command = ["ip", "link", "add", LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise LaunchError(f"no link between the hosts: {made.stderr.strip()}", code="TP-7108")
        yield tuple(hosts)


def run(directory: Path, config: Path, deadline_s: float, *, at_chunk: int, guarded: bool, heal: bool = True) -> Over:
    """Launch one rank a host, cut the link once every rank has made `at_chunk` chunks, heal it when all ranks are gone.

    Not healed, the launchers too have to leave without each other.
    Without guard nothing is healed: what still lives at the deadline shows that it would have lived on.
    """
    over = Over()
    with two_hosts(directory) as hosts:
        for number, host in enumerate(hosts):
            host.ask(json.dumps(_order(directory, config, number, guarded)))
        for host in hosts:
            host.answer(ANSWER_S)
        pids = _wait_for(directory, at_chunk, hosts)
        pidfds = {rank: os.pidfd_open(pid) for rank, pid in pids.items()}
        try:
            over.cut_ns = time.monotonic_ns()
            hosts[0].ask("cut")
            hosts[0].answer(ANSWER_S)
            _watch(over.ended, pidfds, deadline_s)
        finally:
            for pidfd in pidfds.values():
                os.close(pidfd)
        if over.ended.timed_out:
            return over
        if heal:
            hosts[0].ask("heal")
            hosts[0].answer(ANSWER_S)
        for number, host in enumerate(hosts):
            over.outcomes[number] = host.answer(LEAVE_S)["outcome"]
        over.left_ms = round((time.monotonic_ns() - over.cut_ns) / 1e6, 1)
    _note_codes(over.ended, directory)
    return over


def judge_over(seen: Seen, over: Over) -> Result:
    """Ranks and launchers of both hosts are gone in time; both referees say it was the link, and blame no rank."""
    result = judge(seen)
    findings = list(result.findings)
    for number in range(HOSTS):
        verdict = record_of(seen.run_dir, number).get("verdict") or {}
        said = f"the referee of host {number}: {verdict.get('message', 'nothing')}"
        right = verdict.get("kind") in seen.drill.kind and "the link is lost" in str(verdict.get("message"))
        findings.append(find("reason", right and not verdict.get("triggers"), said, verdict.get("kind"), "link"))
        outcome = over.outcomes.get(number, {})
        code = outcome.get("returncode")
        findings.append(find("launcher", bool(code), f"the launcher of host {number} ended with {code}", code, "not 0"))
        left = [*outcome.get("leftovers", ()), *outcome.get("immortal", ())]
        findings.append(find("leftovers", not left, f"host {number} left: {left or 'nothing'}", left, []))
    within = over.left_ms is not None and over.left_ms <= LEAVE_S * 1e3
    findings.append(
        find("launchers gone", within, f"launchers gone after {over.left_ms} ms", over.left_ms, LEAVE_S * 1e3)
    )
    return Result(seen, tuple(findings), {"blame": "the link" if within else result.facts.get("blame")})


def skipped(seen: Seen, reason: str) -> Result:
    return Result(seen, (Finding("two hosts", Verdict.SKIP, reason),))


def _order(directory: Path, config: Path, number: int, guarded: bool) -> dict[str, Any]:
    return {
        "nproc": 1,
        "run_dir": str(directory / f"host{number}"),
        "ranks_dir": str(directory),
        "config": str(config),
        "deadline_s": START_S * 2,
        "node_rank": number,
        "rdzv_endpoint": ENDPOINT,
        "rdzv_id": directory.name,
        "address": ADDRESSES[number],
        "referee": guarded,
    }


def _wait_for(directory: Path, at_chunk: int, hosts: tuple[Host, ...]) -> dict[int, int]:
    """Process ids by rank, once each rank's box shows a chunk of this number or later."""
    deadline = time.monotonic() + START_S
    # A box cannot be waited for, so it is looked at again and again; a host that has something to say then has ended.
    while time.monotonic() < deadline and not select.select(hosts, [], [], POLL_S)[0]:
        pids = {}
        for rank in range(HOSTS):
            with contextlib.suppress(BlackBoxError, OSError):
                box = read_box(directory / "ranks" / f"rank{rank}.blackbox")
                if box.commitments and box.commitments[-1].chunk_index >= at_chunk:
                    pids[rank] = box.pid
        if len(pids) == HOSTS:
            return pids
    raise LaunchError("the job over two hosts did not start; see its launchers' logs", code="TP-7108")


def _watch(ended: Ended, pidfds: Mapping[int, int], deadline_s: float) -> None:
    poller = select.poll()
    ranks = {pidfd: rank for rank, pidfd in pidfds.items()}
    for pidfd in ranks:
        poller.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + deadline_s
    while len(ended.gone_ns) < len(ranks):
        left = deadline - time.monotonic()
        if left <= 0:
            ended.timed_out = True
            return
        for pidfd, _ in poller.poll(left * 1e3):
            ended.gone_ns[ranks[pidfd]] = time.monotonic_ns()
            poller.unregister(pidfd)


def _note_codes(ended: Ended, directory: Path) -> None:
    """Not our children: a rank's own report has its exit code; one that has none was killed."""
    reports = read_reports(directory)
    for rank in ended.gone_ns:
        code = reports.get(rank, {}).get("exit_code")
        ended.codes[rank] = REFEREE_KILL if code is None else int(code)


def record_of(directory: Path, number: int) -> Mapping[str, Any]:
    """What the referee of one host wrote; empty if it wrote nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        record: Mapping[str, Any] = json.loads((directory / f"host{number}" / "referee.json").read_text())
        return record
    return {}
