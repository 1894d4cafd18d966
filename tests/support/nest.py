"""Ranks forked by one nursery, as quick to start as a process can be, and broken as a test says.

`Nest.start` is `ranks.start_ranks` with another way to start. A *plant* is a function of a test module, named as
`module:function`: the rank calls it, with everything imported, before its worker runs.

    python -m tests.support.nest        the nursery itself; `engine.nursery` says what it speaks
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from engine.config import EngineConfig
from tests.support.ranks import DEADLINE_S, Job, Outcome, free_port

PLANT = "TESTS_PLANT"


class Forked:
    """A rank that the nursery forked, with the part of `subprocess.Popen` that `Job` uses."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.started, self.ended = threading.Event(), threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nest:
    """The nursery's process and whatever it forked; nothing outlives `close`."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nest"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._ready = threading.Event()
        self._ranks: dict[str, Forked] = {}
        self._jobs = 0
        self._reader = threading.Thread(target=self._read, name="nest", daemon=True)
        self._reader.start()
        assert self._ready.wait(DEADLINE_S), log.read_text()
        assert self._process.poll() is None, log.read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._reader.join(20)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @contextmanager
    def start(
        self,
        run_dir: Path,
        config: EngineConfig,
        *,
        ranks: list[int] | None = None,
        configs: Mapping[int, EngineConfig] | None = None,
        plants: Mapping[int, str] | None = None,
        arguments: Mapping[int, list[str]] | None = None,
    ) -> Iterator[Job]:
        """Fork `ranks` (default: all). `configs`, `plants` and more `arguments` are for single ranks.

        `job.add(rank)` forks one that comes later.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        job = NestJob(self, run_dir, config, free_port(), configs or {}, plants or {}, arguments or {})
        try:
            for rank in range(config.world_size) if ranks is None else ranks:
                job.add(rank)
            yield job
        finally:
            job.kill()

    def run(self, run_dir: Path, config: EngineConfig, *, deadline_s: float = DEADLINE_S, **how: Any) -> Outcome:
        """Fork ranks and wait for their end, or the deadline. No rank outlives this call."""
        with self.start(run_dir, config, **how) as job:
            return job.end(deadline_s)

    def fork(self, rank: int, argv: list[str], environ: dict[str, str], stderr: Path) -> Forked:
        name = f"{self._jobs}.{rank}"
        self._jobs += 1
        forked = self._ranks[name] = Forked()
        wanted = {"rank": name, "argv": argv, "environ": environ, "stderr": str(stderr)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        assert forked.started.wait(DEADLINE_S), "the nursery does not fork"
        return forked

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                self._ready.set()
                continue
            forked = self._ranks[event["rank"]]
            if event["event"] == "started":
                forked.pid = event["pid"]
                forked.started.set()
            else:
                forked.returncode = event["code"]
                forked.ended.set()
        self._ready.set()


class NestJob(Job):
    """Forked ranks of one job."""

    def __init__(
        self,
        nest: Nest,
        run_dir: Path,
        config: EngineConfig,
        port: int,
        configs: Mapping[int, EngineConfig],
        plants: Mapping[int, str],
        arguments: Mapping[int, list[str]],
    ) -> None:
        super().__init__(run_dir, {})
        self._nest = nest
        self._config = config
        self._port = port
        self._configs = configs
        self._plants = plants
        self._arguments = arguments

    def add(self, rank: int) -> None:
        path = self.run_dir / f"config{rank}.toml"
        path.write_text(tomli_w.dumps(self._configs.get(rank, self._config).to_dict()))
        environ = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._config.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
            "OMP_NUM_THREADS": "1",
            PLANT: self._plants.get(rank, ""),
        }
        log = self.run_dir / f"stderr{rank}.log"
        log.touch()
        argv = ["--config", str(path), "--run-dir", str(self.run_dir), *self._arguments.get(rank, [])]
        self.processes[rank] = self._nest.fork(rank, argv, environ, log)  # type: ignore[assignment]


def main() -> int:
    """The nursery, whose ranks are planted before their worker runs."""
    from engine import nursery, worker

    work = worker.main

    def planted(argv: list[str] | None = None) -> int:
        if plant := os.environ.get(PLANT):
            module, _, function = plant.partition(":")
            getattr(importlib.import_module(module), function)()
        return work(argv)

    worker.main = planted
    return nursery.main()


if __name__ == "__main__":
    sys.exit(main())
