"""Ranks on this host, through torch's elastic launcher. What was started is gone when `run` returns.

The launcher starts each rank in a session of its own, so a process group alone does not reach them. Every process
inherits a tag in its environment instead, and whoever still carries the tag at the end is a leftover.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tpctl.errors import LaunchError
from tpctl.launch.environment import rank_environment
from tpctl.launch.referee import VERDICT, watching
from tpctl.reports import read_reports

TAG = "TPCTL_LAUNCH_TAG"
TICK_S = 0.2
# How long SIGTERM (drain) may take before SIGKILL, and how long the kernel may take to bury the killed.
GRACE_S = 5.0
# With other hosts in the job, the launcher may wait at a store that nobody can reach any more. How long it may do so
# once its ranks are gone and one of them failed.
BEREFT_S = 3.0
REAP_S = 10.0


@dataclass(frozen=True)
class LaunchSpec:
    """What to start: `nproc` ranks of `module` on this host, one host of `nnodes`. Times in seconds.

    `run_dir` takes what belongs to this launch: logs and the referee's verdict. `ranks_dir` is what the ranks call
    their run directory, where that is another one.
    """

    nproc: int
    run_dir: Path
    arguments: Sequence[str]
    deadline_s: float
    module: str = "engine.worker"
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = "localhost:0"
    rdzv_id: str = "job"
    local_addr: str | None = None
    referee: bool = True
    ranks_dir: Path | None = None
    tag: str = ""

    def command(self) -> list[str]:
        """The launcher's command line."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={self.nnodes}",
            f"--nproc-per-node={self.nproc}",
            f"--node-rank={self.node_rank}",
            # Over several hosts who listens, and who holds which ranks, goes by node rank; c10d would go by host names.
            f"--rdzv-backend={'c10d' if self.nnodes == 1 else 'static'}",
            f"--rdzv-endpoint={self.rdzv_endpoint}",
            f"--rdzv-id={self.rdzv_id}",
            *([f"--local-addr={self.local_addr}"] if self.local_addr is not None else []),
            "--max-restarts=0",
            "--monitor-interval=0.1",
            f"--log-dir={self.run_dir / 'logs'}",
            "--redirects=3",
            "-m",
            self.module,
            *self.arguments,
        ]


@dataclass(frozen=True)
class Outcome:
    """How a launch ended. `leftovers` are processes that were alive after the launcher left, and were then killed."""

    returncode: int | None
    timed_out: bool
    wall_s: float
    ended_at: float
    leftovers: tuple[str, ...] = field(default=())
    immortal: tuple[str, ...] = field(default=())


def make_tag() -> str:
    """A tag that no other launch carries."""
    return f"{os.getpid()}-{uuid.uuid4().hex}"


def run(
    spec: LaunchSpec,
    tick: Callable[[float], None] = lambda elapsed_s: None,
    started: Callable[[int], None] = lambda pid: None,
) -> Outcome:
    """Start, wait until the end or the deadline, clean up. `tick` gets the elapsed seconds a few times a second.

    `started` gets the launcher's process id. What either of them raises ends the launch, and is passed on.

    Raises:
        LaunchError: the port is in use, or the launcher cannot be started.
        KeyboardInterrupt: passed on, after everything that was started is gone.
    """
    check_endpoint(spec.rdzv_endpoint, spec.nnodes, spec.node_rank)
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    tag = spec.tag or make_tag()
    began = time.monotonic()
    with (spec.run_dir / "launcher.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                spec.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=rank_environment() | {TAG: tag},
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start the launcher: {error}", code="TP-7102") from error
        try:
            started(process.pid)
            with referee(spec, tag, log):
                timed_out = not _wait(process, began, spec.deadline_s, _with_company(spec, process, log, tick))
            ended_at = time.time()
        except BaseException:
            _end(process, tag)
            raise
        if timed_out:
            _, immortal = _end(process, tag)
            return Outcome(process.returncode, True, time.monotonic() - began, time.time(), (), immortal)
        leftovers, immortal = _kill(tagged(tag))
    return Outcome(process.returncode, False, time.monotonic() - began, ended_at, leftovers, immortal)


def referee(spec: LaunchSpec, tag: str, log: IO[bytes]) -> contextlib.AbstractContextManager[None]:
    """On one host the ranks' numbers are known. With several, the launcher alone knows which are here, and they are
    found by the tag; the other hosts' referees are met at the rendezvous endpoint."""
    if not spec.referee:
        return contextlib.nullcontext()
    verdict = spec.run_dir / VERDICT
    if spec.nnodes == 1:
        which = ["--ranks", ",".join(map(str, range(spec.nproc)))]
    else:
        which = ["--local", str(spec.nproc), "--carrying", f"{TAG}={tag}"]
        which += ["--store", spec.rdzv_endpoint, "--job", spec.rdzv_id]
    return watching(spec.ranks_dir or spec.run_dir, verdict, which, log, {TAG: tag})


def check_endpoint(endpoint: str, nnodes: int = 1, node_rank: int = 0) -> None:
    """A port that was asked for by number must be free on the host that will listen.

    Raises:
        LaunchError: malformed endpoint, or a port that is in use.
    """
    host, _, port_text = endpoint.rpartition(":")
    if not host or not port_text.isdigit() or int(port_text) > 65535:
        raise LaunchError(
            f"the rendezvous endpoint must be HOST:PORT, is {endpoint!r}", code="TP-7103", next_step="localhost:0"
        )
    if int(port_text) == 0 or (nnodes > 1 and node_rank != 0):
        return
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if nnodes > 1 else host, int(port_text)))
        except OSError as error:
            raise LaunchError(
                f"port {port_text} on {host} cannot be used: {error.strerror}",
                code="TP-7104",
                evidence={"endpoint": endpoint},
                next_step="leave --rdzv-endpoint out, and a free port is chosen",
            ) from error


def tagged(tag: str) -> list[int]:
    """Ids of living processes that carry the tag."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def _wait(process: subprocess.Popen[bytes], started: float, deadline_s: float, tick: Callable[[float], None]) -> bool:
    """True if it ended by itself before the deadline."""
    while True:
        elapsed = time.monotonic() - started
        if elapsed >= deadline_s:
            return False
        try:
            process.wait(timeout=min(TICK_S, deadline_s - elapsed))
        except subprocess.TimeoutExpired:
            tick(time.monotonic() - started)
        else:
            return True


def _with_company(
    spec: LaunchSpec, process: subprocess.Popen[bytes], log: IO[bytes], tick: Callable[[float], None]
) -> Callable[[float], None]:
    """With other hosts in the job, a tick that also ends a launcher which waits for them in vain."""
    if spec.nnodes == 1:
        return tick
    ranks: set[int] = set()
    since = float("inf")

    def ticking(elapsed_s: float) -> None:
        nonlocal since
        tick(elapsed_s)
        alive = _children(process.pid)
        ranks.update(alive)
        if alive or not _failed(spec.ranks_dir or spec.run_dir, ranks):
            since = float("inf")
            return
        since = min(since, elapsed_s)
        if elapsed_s - since >= BEREFT_S:
            log.write(b"tpctl: this host's ranks have failed and are gone; the launcher waits for other hosts: ended\n")
            process.kill()

    return ticking


def _children(pid: int) -> set[int]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return {child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE}
    return set()


def _failed(ranks_dir: Path, pids: set[int]) -> bool:
    """Did one of these processes, which are gone, end badly or without a word?"""
    reports = (report for report in read_reports(ranks_dir).values() if report.get("pid") in pids)
    return bool(pids) and sum(report.get("exit_code") == 0 for report in reports) < len(pids)


def _end(process: subprocess.Popen[bytes], tag: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """SIGTERM and a little grace, then SIGKILL, for the launcher's group and everyone who carries the tag."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=REAP_S)
    return _kill(tagged(tag))


def _kill(pids: list[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Kill and wait. Returns what was found alive, and what outlived SIGKILL."""
    import psutil

    processes, names = [], {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            names[pid] = f"{pid} {' '.join(process.cmdline()[:6])}"
            process.kill()
            processes.append(process)
    _, alive = psutil.wait_procs(processes, timeout=REAP_S)
    return tuple(names.values()), tuple(names[process.pid] for process in alive)
