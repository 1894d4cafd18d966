"""A referee beside ranks that a test started."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ranks import Job


@dataclass
class Beside:
    """A running referee."""

    run_dir: Path
    process: subprocess.Popen[bytes]

    def leave(self, deadline_s: float = 20.0) -> int:
        """Its exit code: 0 without a verdict, 1 with one. It leaves by itself once every rank is gone."""
        return self.process.wait(deadline_s)

    @property
    def record(self) -> dict[str, Any] | None:
        path = self.run_dir / "referee.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def said(self) -> str:
        return (self.run_dir / "referee.log").read_text()


@contextmanager
def referee(run_dir: Path, ranks: Sequence[int] = (0, 1)) -> Iterator[Beside]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "referee.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.referee", "--run-dir", str(run_dir), "--ranks", ",".join(map(str, ranks))],
            stderr=log,
        )
    try:
        yield Beside(run_dir, process)
    finally:
        process.kill()
        process.wait(10)


def gone_after(job: Job, since: float, deadline_s: float) -> float:
    """Seconds from `since` (monotonic) until the last rank was gone."""
    for process in job.processes.values():
        process.wait(max(0.1, since + deadline_s - time.monotonic()))
    return time.monotonic() - since
