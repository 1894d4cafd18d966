"""Ranks forked by processes that have imported everything, so that a rank starts at once, and broken as a test says.

Two of them: a mesh rank of a generator-only plan is forked from one that never saw the codecs, since its report says
what it imported. They are started when first asked for, serve the whole test run, and end with it. A *plant* is a
function of a test module, named as `module:function`: the rank calls it before its worker runs.

    python -m tests.support.nursery [--bare]        the process itself; `engine.nursery` says what it speaks
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from tpctl.launch.environment import rank_environment

READY_S = 120.0
PLANT = "TESTS_PLANT"


class Forked:
    """A forked rank, to be handled like a `subprocess.Popen`."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.started = threading.Event()
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout) or self.returncode is None:
            raise subprocess.TimeoutExpired("a forked rank", timeout or 0.0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()


class Nursery:
    """The process, whose events a thread reads. Nothing that it forked outlives `close`."""

    def __init__(self, *, bare: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery", *(["--bare"] if bare else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=rank_environment(),
            start_new_session=True,
        )
        self._ready = threading.Event()
        self._ranks: dict[str, Forked] = {}
        self._names = map(str, count())
        threading.Thread(target=self._read, name="nursery", daemon=True).start()
        assert self._ready.wait(READY_S), "the nursery of ranks did not start"

    def fork(self, argv: Sequence[str], environ: Mapping[str, str], stderr: Path) -> Forked:
        """A rank, running."""
        name = next(self._names)
        rank = self._ranks[name] = Forked()
        wanted = {"rank": name, "argv": list(argv), "environ": dict(environ), "stderr": str(stderr)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        assert rank.started.wait(READY_S), "the nursery of ranks is gone"
        return rank

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "ready":
                self._ready.set()
            elif event["event"] == "started":
                self._ranks[event["rank"]].pid = event["pid"]
                self._ranks[event["rank"]].started.set()
            else:
                self._ranks.pop(event["rank"]).end(event["code"])


@cache
def nursery(*, bare: bool) -> Nursery:
    made = Nursery(bare=bare)
    atexit.register(made.close)
    return made


def main() -> int:
    """`engine.nursery`, whose ranks are planted before their worker runs."""
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
