"""What is true of a job now, read from outside: its record, its processes, its ranks' black boxes. Asks nobody."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from engine.blackbox import BlackBoxError, Box, Commitment, Live, Stream
from engine.lifecycle import RankState
from engine.process import Process, boot_id
from tpctl.follow import box_ranks
from tpctl.jobs.place import JobDir
from tpctl.jobs.record import JobRecord


@dataclass(frozen=True)
class RankSeen:
    """One rank at one moment. `letter` is the kernel's state of its process, empty if it is gone."""

    rank: int
    process: Process
    letter: str
    live: Live
    stream: Stream
    last: Commitment | None
    rss_bytes: int | None

    @property
    def state(self) -> RankState:
        return self.live.state

    @property
    def phase(self) -> str:
        """What its loop is at, as far as it says so; else what its groups are for now."""
        return self.stream.doing.value or self.live.phase

    @property
    def alive(self) -> bool:
        return self.letter not in ("", "Z", "X")


@dataclass(frozen=True)
class Seen:
    """A job at one moment; `now_ns` is this host's monotonic clock, which black boxes are stamped with.

    `same_boot` is False for what a host left behind before it went down: no process of it can live.
    """

    record: JobRecord
    run_dir: Path | None  # of the last attempt
    same_boot: bool
    supervisor_alive: bool
    ranks: tuple[RankSeen, ...]
    problems: tuple[str, ...]
    now_ns: int

    @property
    def over(self) -> bool:
        """Nothing of it will move again: it has its ending, or nobody is left."""
        return not self.supervisor_alive and not any(rank.alive for rank in self.ranks)


def observe(job: JobDir) -> Seen:
    """Raises JobError: the record cannot be read."""
    record = JobRecord.read(job.record)
    same_boot = record.boot == boot_id()
    supervisor_alive = same_boot and record.supervisor is not None and record.supervisor.alive()
    ranks: list[RankSeen] = []
    problems: list[str] = []
    run_dir = job.run_dir(record.attempt.number) if record.attempt is not None else None
    if run_dir is not None:
        ranks = observe_ranks(run_dir, problems, same_boot)
    return Seen(record, run_dir, same_boot, supervisor_alive, tuple(ranks), tuple(problems), time.monotonic_ns())


def observe_ranks(run_dir: Path, problems: list[str] | None = None, same_boot: bool = True) -> list[RankSeen]:
    """Every rank that has a black box, in order. What cannot be read is named in `problems`."""
    found = []
    for rank in box_ranks(run_dir):
        try:
            with Box(run_dir / "ranks" / f"rank{rank}.blackbox") as box:
                process = Process(box.pid, box.start_ticks)
                letter = process.letter() if same_boot else ""
                last = None
                with contextlib.suppress(BlackBoxError):  # a busy writer; the next look will tell
                    last = box.last_commitment()
                rss = process.rss_bytes() if letter else None
                found.append(RankSeen(rank, process, letter, box.live(), box.stream(), last, rss))
        except BlackBoxError as error:
            if problems is not None:
                problems.append(error.message)
    return found
