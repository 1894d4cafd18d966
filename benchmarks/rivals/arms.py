"""The loop under each launcher, watched from outside: which process ended when, and what was said."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rivals.faults import Fault

WORLD = 2
START_S = 90.0
LOOP = "benchmarks.rivals.loop"
ROOT = Path(__file__).parents[2]

PLAIN, TORCHRUN, DETAIL, GUARDED = "processes", "torchrun", "detail", "guarded"
TITLES = {
    PLAIN: "plain processes",
    TORCHRUN: "torchrun",
    DETAIL: "torchrun, TORCH_DISTRIBUTED_DEBUG=DETAIL",
    GUARDED: "the same loop with Group and referee",
}


@dataclass
class Ending:
    """Times in monotonic nanoseconds. `codes` are those of the processes that we started: ranks, or the launcher."""

    injected_ns: int | None = None
    rank_gone_ns: dict[int, int] = field(default_factory=dict)
    gone_ns: int = 0
    cut: bool = False
    codes: list[int] = field(default_factory=list)
    log: str = ""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    referee: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        """By itself, before the cut."""
        return not self.cut and any(self.codes)

    def after_ms(self, moment_ns: int) -> float | None:
        return None if self.injected_ns is None else round((moment_ns - self.injected_ns) / 1e6, 1)


def run(arm: str, fault: Fault | None, directory: Path, *, cut_s: float, chunks: int = 20) -> Ending:
    """One job in `directory`, which is made. Cut `cut_s` seconds after the injection; nothing outlives the call.

    Raises:
        RuntimeError: the job did not start, or ended before the fault.
    """
    directory.mkdir(parents=True)
    arguments = ["-m", LOOP, "--run-dir", str(directory), "--chunks", str(chunks), "--at", str(chunks // 2)]
    if fault is not None:
        arguments += ["--fault", fault.plant, "--victim", str(fault.victim)]
    if arm == GUARDED:
        arguments += ["--guarded"]
    log = directory / "log"
    referee = _start_referee(directory) if arm == GUARDED else None
    with log.open("wb") as stream:
        processes = [
            subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            for command, environ in _commands(arm, arguments)
        ]
    ending = Ending()
    try:
        _watch(ending, processes, directory, cut_s, expected=fault is not None)
        if referee is not None:
            with suppress(subprocess.TimeoutExpired):
                referee.wait(15)
    finally:
        for process in [*processes, *([referee] if referee is not None else [])]:
            if process.poll() is None:
                process.kill()
            process.wait(10)
    ending.log = log.read_text(errors="replace")
    ending.codes = [process.returncode for process in processes]
    for rank in range(WORLD):
        with suppress(OSError):
            ending.results[rank] = json.loads((directory / f"rank{rank}.result.json").read_text())
    with suppress(OSError):
        ending.referee = json.loads((directory / "referee.json").read_text())
    if fault is not None and ending.injected_ns is None:
        raise RuntimeError(f"{arm}, {fault.id}: ended before the fault: {ending.log[-2000:]}")
    return ending


def _commands(arm: str, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    environ.pop("TORCH_DISTRIBUTED_DEBUG", None)
    if arm != PLAIN:
        if arm == DETAIL:
            environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
        return [([*torchrun, *arguments], environ)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [([sys.executable, *arguments], environ | {"RANK": str(rank)}) for rank in range(WORLD)]


def _start_referee(directory: Path) -> subprocess.Popen[bytes]:
    (directory / "ranks").mkdir()
    ranks = ",".join(map(str, range(WORLD)))
    with (directory / "referee.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "engine.referee", "--run-dir", str(directory), "--ranks", ranks], stderr=log
        )


def _watch(
    ending: Ending, processes: list[subprocess.Popen[bytes]], directory: Path, cut_s: float, *, expected: bool
) -> None:
    """Until every rank and every process of ours is gone, or until the cut, which kills them."""
    fds: dict[int, int | None] = {os.pidfd_open(process.pid): None for process in processes}  # rank, where it is one
    known: set[int] = set()
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    end_s = time.monotonic() + START_S
    try:
        while fds:
            for rank in set(range(WORLD)) - known:
                with suppress(OSError, ValueError):
                    pid = int((directory / f"rank{rank}.pid").read_text())
                    known.add(rank)
                    fd = os.pidfd_open(pid)  # gone already: then the next look at the processes will tell
                    fds[fd] = rank
                    poller.register(fd, select.POLLIN)
            if ending.injected_ns is None:
                with suppress(OSError):
                    ending.injected_ns = int((directory / "inject").read_text())
                    end_s = ending.injected_ns / 1e9 + cut_s
            for fd, _ in poller.poll(10):
                now_ns = time.monotonic_ns()
                ending.gone_ns = max(ending.gone_ns, now_ns)
                rank_of_fd = fds.pop(fd)
                if rank_of_fd is not None:
                    ending.rank_gone_ns[rank_of_fd] = now_ns
                poller.unregister(fd)
                os.close(fd)
            if time.monotonic() > end_s and not ending.cut:
                ending.cut = True
                for fd in fds:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                end_s += START_S
    finally:
        for fd in fds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
    if ending.injected_ns is None:
        with suppress(OSError):
            ending.injected_ns = int((directory / "inject").read_text())
    if ending.cut and expected and ending.injected_ns is None:
        raise RuntimeError(f"no fault within {START_S:g} s: {(directory / 'log').read_text()[-2000:]}")
