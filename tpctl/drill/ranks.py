"""Ranks for drills, forked by one nursery, and when each of them ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.process import Process
from tpctl.errors import LaunchError
from tpctl.launch.environment import rank_environment

READY_S = 120.0
# How long the kernel may take to bury what was killed, and the referee to see it.
BURY_S = 10.0
REFEREE = "referee"


@dataclass
class Ended:
    """How a job of ranks ended. Times are monotonic nanoseconds; `forced` ranks did not end by themselves.

    `referee` is the exit code of the referee: 1 if it gave a verdict, None if there was none.
    """

    codes: dict[int, int] = field(default_factory=dict)
    gone_ns: dict[int, int] = field(default_factory=dict)
    forced: dict[int, str] = field(default_factory=dict)
    referee: int | None = None
    timed_out: bool = False
    leftovers: tuple[str, ...] = ()


class Nursery:
    """`python -m engine.nursery`: started once, asked for ranks many times. A context manager; nothing outlives it."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=rank_environment(),
                start_new_session=True,
            )
        self._pending = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out(), selectors.EVENT_READ)
        if not any(event["event"] == "ready" for event in self._events(READY_S)):
            self.close()
            raise LaunchError(f"the nursery of ranks did not start; log: {log}", code="TP-7106")

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Every rank that is left goes with it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._selector.close()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def run(
        self, run_dir: Path, config: Path, ranks: int, deadline_s: float, supervise_s: float, *, referee: bool
    ) -> Ended:
        """Start `ranks` ranks, with a referee beside them or without; return when all are gone.

        Args:
            run_dir: gets `stderr<rank>.log`, and `ranks/` from the ranks themselves.
            config: the file every rank reads.
            deadline_s: for the whole job; who is left then is killed.
            supervise_s: how long a rank may outlive all others when it is stopped, before it is killed.
        """
        ended = Ended()
        pids: dict[int, int] = {}
        judging = False
        if referee:
            self._start_referee(run_dir, ranks)
            judging = True
        port = free_port()
        before = set(os.listdir("/dev/shm"))
        for rank in range(ranks):
            environ = rank_environment() | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self._ask(
                {
                    "rank": rank,
                    "argv": ["--config", str(config), "--run-dir", str(run_dir)],
                    "environ": environ,
                    "stderr": str(run_dir / f"stderr{rank}.log"),
                }
            )
        end = time.monotonic() + deadline_s
        while len(ended.codes) < ranks or judging:
            left = end - time.monotonic()
            if left <= 0 and not ended.timed_out:
                ended.timed_out = True
                for rank in pids.keys() - ended.codes.keys():
                    self._kill(ended, rank, pids[rank], "alive at the deadline")
                end = time.monotonic() + BURY_S
            elif left <= 0:
                break
            for event in self._events(min(0.1, max(0.0, left))):
                if event["rank"] == REFEREE:
                    judging = event["event"] == "started"
                    ended.referee = event.get("code")
                elif event["event"] == "started":
                    pids[event["rank"]] = event["pid"]
                elif event["event"] == "ended":
                    ended.codes[event["rank"]] = event["code"]
                    ended.gone_ns[event["rank"]] = event["t_ns"]
            if not referee:
                self._supervise(ended, pids, supervise_s)
        leftovers = [f"rank {rank}: pid {pids[rank]}" for rank in pids.keys() - ended.codes.keys()]
        leftovers += ["the referee"] if judging else []
        leftovers += [f"shared memory {name}" for name in set(os.listdir("/dev/shm")) - before if "torch" in name]
        if _listening(port):
            leftovers.append(f"port {port} still listens")
        ended.leftovers = tuple(leftovers)
        return ended

    def _start_referee(self, run_dir: Path, ranks: int) -> None:
        (run_dir / "ranks").mkdir(mode=0o700, exist_ok=True)
        named_ranks, parent = ",".join(map(str, range(ranks))), str(Process.of(self._process.pid))
        self._ask(
            {
                "rank": REFEREE,
                "argv": ["--run-dir", str(run_dir), "--ranks", named_ranks, "--parent", parent],
                "environ": rank_environment(),
                "stderr": str(run_dir / "referee.log"),
            }
        )

    def _supervise(self, ended: Ended, pids: Mapping[int, int], supervise_s: float) -> None:
        """A stopped rank cannot end itself: once a peer has failed, it is this supervisor's to end."""
        if not any(ended.codes.values()):
            return
        first_ns = min(ended.gone_ns[rank] for rank, code in ended.codes.items() if code)
        for rank in pids.keys() - ended.codes.keys() - ended.forced.keys():
            if time.monotonic_ns() - first_ns > supervise_s * 1e9 and _state(pids[rank]) == "T":
                self._kill(ended, rank, pids[rank], "stopped")

    def _kill(self, ended: Ended, rank: int, pid: int, why: str) -> None:
        ended.forced[rank] = why
        os.kill(pid, signal.SIGKILL)

    def _ask(self, wanted: Mapping[str, Any]) -> None:
        if self._process.stdin is None:
            raise LaunchError("the nursery is closed", code="TP-7106")
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()

    def _events(self, timeout_s: float) -> list[dict[str, Any]]:
        if not self._selector.select(timeout_s):
            return []
        read = os.read(self._out(), 1 << 16)
        if not read:
            raise LaunchError("the nursery of ranks is gone", code="TP-7106")
        *lines, self._pending = (self._pending + read).split(b"\n")
        return [json.loads(line) for line in lines]

    def _out(self) -> int:
        if self._process.stdout is None:
            raise LaunchError("the nursery is closed", code="TP-7106")
        return self._process.stdout.fileno()


def _state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    return stat[stat.rindex(")") + 2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
