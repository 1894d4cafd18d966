"""Starts real ranks of `engine.worker`, one process each, with the environment that a launcher would give them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from engine.blackbox import BlackBoxError, Commitment, read
from engine.config import EngineConfig
from engine.log import log_path
from engine.plan import PP_PLANS, V1
from tests.support.nursery import PLANT, Forked, nursery

DEADLINE_S = 120.0
WORKER = ("-m", "engine.worker")


@dataclass(frozen=True)
class Outcome:
    """How a job of ranks ended. `exit_codes` by rank; a rank that the deadline cut reads -9."""

    exit_codes: dict[int, int]
    stderr: dict[int, str]
    reports: dict[int, dict[str, Any]]
    run_dir: Path

    def events(self, rank: int, name: str) -> list[dict[str, Any]]:
        """What the rank's log has of one kind, in order."""
        _, *lines = log_path(self.run_dir, rank).read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Process = subprocess.Popen[bytes] | Forked


class Job:
    """Ranks that run now. `end` waits for all of them; leaving the `with` block kills what is left."""

    def __init__(self, run_dir: Path, start: Callable[[int], Process]) -> None:
        self.run_dir = run_dir
        self.processes: dict[int, Process] = {}
        self._start = start

    def add(self, rank: int) -> None:
        """Start this rank, now or later than the others."""
        self.processes[rank] = self._start(rank)

    def wait_for(self, condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Poll until `condition` holds; fails when the deadline passes or when every rank is gone."""
        end = time.monotonic() + deadline_s
        while not condition():
            alive = any(process.poll() is None for process in self.processes.values())
            assert alive, f"all ranks ended before: {what}; {self.stderr()}"
            assert time.monotonic() < end, f"not within {deadline_s} s: {what}; {self.stderr()}"
            # A poll of the outside world: there is no event to wait for across processes here.
            self._nap.wait(0.01)

    def reached(self, rank: int, action: str, chunk_index: int) -> bool:
        """Whether the rank's black box shows this commitment point."""
        path = self.run_dir / "ranks" / f"rank{rank}.blackbox"
        return path.exists() and any(
            (record.action, record.chunk_index) == (action, chunk_index) for record in _records(path)
        )

    def stderr(self) -> dict[int, str]:
        return {rank: (self.run_dir / f"stderr{rank}.log").read_text(errors="replace") for rank in self.processes}

    def end(self, deadline_s: float = DEADLINE_S) -> Outcome:
        end = time.monotonic() + deadline_s
        for process in self.processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()
        return Outcome(
            exit_codes={rank: process.returncode for rank, process in self.processes.items()},
            stderr=self.stderr(),
            reports={
                rank: json.loads(path.read_text())
                for rank in self.processes
                if (path := self.run_dir / "ranks" / f"rank{rank}.json").exists()
            },
            run_dir=self.run_dir,
        )

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    _nap = threading.Event()


def run_ranks(run_dir: Path, config: EngineConfig, *, deadline_s: float = DEADLINE_S, **how: Any) -> Outcome:
    """Run ranks to their end, or to the deadline. No process outlives this call. `how` is that of `start_ranks`."""
    with start_ranks(run_dir, config, **how) as job:
        return job.end(deadline_s)


@contextmanager
def start_ranks(
    run_dir: Path,
    config: EngineConfig,
    *,
    world_size: int | None = None,
    ranks: Sequence[int] | None = None,
    configs: Mapping[int, EngineConfig] | None = None,
    plants: Mapping[int, str] | None = None,
    arguments: Mapping[int, Sequence[str]] | None = None,
    environ: Mapping[int, Mapping[str, str]] | None = None,
    port: int | None = None,
    entry: Sequence[str] = WORKER,
    fresh: bool = False,
) -> Iterator[Job]:
    """Start `ranks` (default: all); `job.add` starts one that comes later.

    `configs`, `plants`, more `arguments` and `environ` are for single ranks. `entry` is what the interpreter is told to
    run; a test may wrap the worker. Ranks are forked from a process that has imported everything, unless they are
    `fresh`, have variables of their own or another entry; only a forked rank can be planted.
    """
    fresh = fresh or environ is not None or tuple(entry) != WORKER
    assert not (fresh and plants)
    world_size = world_size or config.world_size
    port = port or free_port()
    run_dir.mkdir(parents=True, exist_ok=True)

    def start(rank: int) -> Process:
        path = run_dir / f"config{rank}.toml"
        own = (configs or {}).get(rank, config)
        path.write_text(tomli_w.dumps(own.to_dict()))
        argv = ["--config", str(path), "--run-dir", str(run_dir), *(arguments or {}).get(rank, [])]
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        stderr = run_dir / f"stderr{rank}.log"
        if not fresh:
            stderr.touch()  # the rank itself opens it, maybe after a test looks
            bare = own.plan.tp_plan in (V1, *PP_PLANS) and rank != 0
            return nursery(bare=bare).fork(argv, environment | {PLANT: (plants or {}).get(rank, "")}, stderr)
        with stderr.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *entry, *argv],
                env=environment | (environ or {}).get(rank, {}),
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    job = Job(run_dir, start)
    try:
        for rank in ranks if ranks is not None else range(world_size):
            job.add(rank)
        yield job
    finally:
        job.kill()


def _records(path: Path) -> list[Commitment]:
    try:
        return read(path)
    except BlackBoxError:
        return []  # being made right now
