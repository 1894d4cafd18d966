"""The record files of a run directory, read together: once for a job that is gone, again and again while it runs."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blackbox import BlackBoxError
from engine.blackbox.reader import Box
from engine.config import load
from engine.errors import EngineError
from engine.process import start_ticks
from engine.records import ALGORITHM, Header, RecordReader, RecordsError
from tpctl.errors import RunError
from tpctl.reports import read_reports


@dataclass
class RankRecords:
    """One rank's file. `problem` is why nothing more of it can be used."""

    rank: int
    reader: RecordReader
    problem: str | None = None
    new: list[dict[str, Any]] = field(default_factory=list)

    @property
    def header(self) -> Header | None:
        return self.reader.header


class RunRecords:
    """All ranks' records in one run directory.

    Raises:
        RunError: there is no run in this directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.ranks: dict[int, RankRecords] = {}
        self.foreign: list[str] = []
        require_run(run_dir)

    def poll(self) -> None:
        """Read what came since the last time into `new` of each rank."""
        for path in sorted((self.run_dir / "ranks").glob("rank*.chunks.jsonl")):
            number = path.name.removeprefix("rank").removesuffix(".chunks.jsonl")
            if number.isdigit() and int(number) not in self.ranks:
                self.ranks[int(number)] = RankRecords(int(number), RecordReader(path))
        for records in self.ranks.values():
            records.new = []
            if records.problem is None:
                try:
                    records.new = records.reader.poll()
                except RecordsError as error:
                    records.problem = error.message
            if records.header is not None and records.header.rank != records.rank:
                records.problem = f"{records.reader.path} says it is of rank {records.header.rank}"
                records.new = []
            elif records.header is not None and records.header.algorithm != ALGORITHM:
                records.problem = f"{records.reader.path} holds {records.header.algorithm}; this tool reads {ALGORITHM}"
                records.new = []

    def settle(self) -> str | None:
        """The job that most records name; the others' are foreign from then on. None: no majority, no job."""
        jobs = Counter(r.header.job for r in self.ranks.values() if r.header is not None and r.problem is None)
        if not jobs:
            return None
        (job, count), *others = jobs.most_common()
        for records in self.ranks.values():
            if records.header is not None and records.problem is None:
                if others and others[0][1] == count:
                    records.problem = f"{records.reader.path} is of job {records.header.job}, others are of another"
                elif records.header.job != job:
                    records.problem = f"{records.reader.path} is of another job ({records.header.job}, not {job})"
        return None if others and others[0][1] == count else job

    @property
    def expected_ranks(self) -> int:
        """Of the configuration, of the records, of the files: whichever knows of most ranks."""
        sizes = [r.header.world_size for r in self.ranks.values() if r.header is not None and r.problem is None]
        return max([*sizes, configured_ranks(self.run_dir), *(rank + 1 for rank in self.ranks)])

    def alive(self) -> bool:
        """Whether any rank of this run still works, as far as this host can see."""
        reports = read_reports(self.run_dir)
        return any(is_alive(self.run_dir, rank, reports.get(rank, {})) for rank in box_ranks(self.run_dir))


def require_run(run_dir: Path) -> None:
    """Raises RunError unless this looks like a run directory."""
    if not run_dir.is_dir():
        raise RunError(f"there is no directory {run_dir}", code="TP-7501", where=str(run_dir))
    if not (run_dir / "ranks").is_dir():
        raise RunError(f"{run_dir} is no run directory: it has no ranks/", code="TP-7502", where=str(run_dir))


def configured_ranks(run_dir: Path) -> int:
    """Ranks by `config.toml`; 0 where it is missing or cannot be read."""
    for name in ("config.toml", "config0.toml"):
        try:
            return load([("run", run_dir / name)]).config.world_size
        except EngineError:
            continue
    return 0


def box_ranks(run_dir: Path) -> list[int]:
    names = (path.name.removeprefix("rank").removesuffix(".blackbox") for path in run_dir.glob("ranks/rank*.blackbox"))
    return sorted(int(name) for name in names if name.isdigit())


def is_alive(run_dir: Path, rank: int, report: Mapping[str, Any]) -> bool:
    """Whether this rank's process, the same one, lives on this host. A rank of another host lives till it reports."""
    if report.get("exit_code") is not None:
        return False
    if report.get("host", socket.gethostname()) != socket.gethostname():
        return True
    try:
        with Box(run_dir / "ranks" / f"rank{rank}.blackbox") as box:
            os.kill(box.pid, 0)
            return bool(start_ticks(box.pid) == box.start_ticks)
    except (BlackBoxError, OSError):
        return False
