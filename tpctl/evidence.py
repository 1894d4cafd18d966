"""What a run left, gathered for triage: of each rank its report, black box and log, and what was said from outside.

Nothing here judges. What is missing, damaged or of another job is a problem, by rank or of the run; it is never used.
"""

from __future__ import annotations

import signal
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.blackbox import Contents
from engine.lifecycle import RankState
from engine.process import start_ticks
from engine.referee.snapshot import Life
from tpctl.errors import RunError
from tpctl.follow import configured_ranks
from tpctl.launch.referee import VERDICT
from tpctl.remains import (
    BoxSeen,
    RefereeSaid,
    Report,
    launcher_failures,
    rank_log,
    read_blackbox,
    read_records_head,
    read_referee,
    read_report,
    referee_spoke,
)

LEFT = frozenset({RankState.EXITED, RankState.ABORTED})
LAUNCHER_LOG = "launcher.log"


@dataclass(frozen=True)
class RankSeen:
    """One rank. `status` is its exit code as the launcher or the referee saw it, negative for a signal.

    `life` is the kernel's word now; None where it cannot be asked: on another host, or without a process to ask for.
    `cut` is whether the referee ended it: that it wrote nothing then says nothing.
    """

    rank: int
    report: Report | None = None
    box: BoxSeen | None = None
    life: Life | None = None
    status: int | None = None
    cut: bool = False
    log: Path | None = None
    problems: tuple[str, ...] = ()

    @property
    def contents(self) -> Contents | None:
        return self.box.contents if self.box else None

    @property
    def ended(self) -> int | None:
        """The exit code that the rank wrote down itself."""
        return self.report.exit_code if self.report else None

    @property
    def exit_code(self) -> int | None:
        return self.ended if self.ended is not None else self.status

    @property
    def silent(self) -> bool:
        """Proved: it is gone, and it wrote nothing of its end."""
        if self.problems or self.cut or self.ended is not None or self.life not in (Life.GONE, None):
            return False
        if self.contents is not None and self.contents.live.state in LEFT:
            return False  # it did write of its end; the report is what is missing
        return self.life is Life.GONE or self.status is not None

    @property
    def known(self) -> bool:
        """Whether this rank's evidence is whole."""
        return not self.problems and (self.ended is not None or self.silent or self.cut or self.alive)

    @property
    def alive(self) -> bool:
        return self.life in (Life.ALIVE, Life.STOPPED)


@dataclass(frozen=True)
class Seen:
    """A run as it lies there. `first_dead` is the rank that the launcher saw fail first.

    `referee_lost`: there was a verdict of the referee, which then ended ranks, but it cannot be read.
    """

    run_dir: Path
    ranks: tuple[RankSeen, ...]
    referee: RefereeSaid | None = None
    first_dead: int | None = None
    referee_lost: bool = False
    job: str | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def alive(self) -> bool:
        return any(rank.alive for rank in self.ranks)

    def of(self, rank: int) -> RankSeen | None:
        return next((seen for seen in self.ranks if seen.rank == rank), None)


def is_run(directory: Path) -> bool:
    """Whether any rank, launcher or referee left something here."""
    return (directory / "ranks").is_dir() or any((directory / name).is_file() for name in (VERDICT, LAUNCHER_LOG))


def find_runs(path: Path) -> list[Path]:
    """The run directory itself, or those that a bring-up or the drills made in it.

    Raises:
        RunError: there is nothing of a run here.
    """
    if path.is_file():
        how = f"unzip {path} -d DIR" if path.suffix == ".zip" else f"tar -xf {path} -C DIR"
        raise RunError(
            f"{path} is a file; triage reads run directories",
            code="TP-7503",
            where=str(path),
            next_step=f"mkdir DIR && {how}, then tpctl triage on the run directory in it",
        )
    if not path.is_dir():
        raise RunError(f"there is no directory {path}", code="TP-7501", where=str(path))
    if is_run(path):
        return [path]
    try:
        runs = sorted(child for child in path.iterdir() if child.is_dir() and is_run(child))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", code="TP-7505", where=str(path)) from error
    if not runs:
        raise RunError(
            f"{path} holds nothing of a run: no ranks/, no {LAUNCHER_LOG}, no {VERDICT}, nor has a directory in it",
            code="TP-7504",
            where=str(path),
        )
    return runs


def gather(run_dir: Path, lives: Mapping[int, Life] | None = None) -> Seen:
    """Everything that a run left, or leaves at this moment. With `lives`, of ranks that were asked for it earlier or
    elsewhere, this host's kernel is not asked: process ids of then or there mean nothing here and now."""
    deaths = launcher_failures(run_dir / LAUNCHER_LOG)
    referee, problem = read_referee(run_dir / VERDICT)
    problems = [problem] if problem else []
    if referee is None and problem is None and referee_spoke(run_dir):
        problems.append(f"{VERDICT} is missing, and the referee's log says that it gave a verdict")
    lost = referee is None and bool(problems)
    ranks: dict[int, RankSeen] = {}
    jobs: dict[int, str] = {}
    worlds = [configured_ranks(run_dir)]
    found = _numbered(run_dir)
    for rank in sorted({*found, *deaths, *(referee.pids if referee else ())}):
        ranks[rank], head = _read_rank(run_dir, rank, lives)
        if head is not None:
            jobs[rank] = head["job"]
            worlds.append(head["world_size"])
    expected = max(worlds)
    for rank in _strangers(ranks, expected):
        problems.append(f"rank {rank} is not of this run, which has {expected}: its files are of another job")
        del ranks[rank]
    ranks = _of_one_job(ranks, {rank: job for rank, job in jobs.items() if rank in ranks})
    for rank in range(expected):
        if rank not in ranks:
            ranks[rank] = RankSeen(rank)
    if referee is not None and not _same_processes(referee, ranks):
        problems.append(f"{VERDICT} is of another job: its process ids are not those of these ranks")
        referee, lost = None, True
    boxes = any(seen.box for seen in ranks.values())
    for rank, seen in ranks.items():
        status = deaths.get(rank)
        cut = referee is not None and rank in referee.killed and seen.ended is None
        if status is None and referee is not None and (cut or rank in referee.signals):
            status = -referee.signals.get(rank, signal.SIGKILL)
        told = replace(seen, status=status, cut=cut, log=rank_log(run_dir, rank))
        ranks[rank] = replace(told, problems=(*told.problems, *_gaps(told, boxes)))
    for rank, seen in ranks.items():
        # Rank 0 of a pp job is in no mesh, has no cache, and keeps no such records.
        if jobs and rank not in jobs and seen.ended == 0 and seen.report is not None and seen.report.in_mesh:
            problems.append(f"rank {rank} has no chunk records, other ranks have")
    job = Counter(jobs.values()).most_common(1)[0][0] if jobs else None
    first = None if lost else next(iter(deaths), None)
    return Seen(run_dir, tuple(ranks[rank] for rank in sorted(ranks)), referee, first, lost, job, tuple(problems))


def _numbered(run_dir: Path) -> set[int]:
    names = (path.name.split(".")[0].removeprefix("rank") for path in run_dir.glob("ranks/rank*.*"))
    return {int(name) for name in names if name.isdecimal() and len(name) < 7}


def _read_rank(run_dir: Path, rank: int, lives: Mapping[int, Life] | None) -> tuple[RankSeen, Mapping[str, Any] | None]:
    ranks = run_dir / "ranks"
    report, no_report = read_report(ranks / f"rank{rank}.json", rank)
    box, no_box = read_blackbox(ranks / f"rank{rank}.blackbox", rank)
    head, no_head = read_records_head(ranks / f"rank{rank}.chunks.jsonl")
    problems = [problem for problem in (no_report, no_box) if problem]
    if report is not None and box is not None and report.pid != box.contents.pid:
        problems.append(f"report and black box of rank {rank} are of different processes: one is of another job")
        report = box = None
    if no_head and not (head is not None and (report is None or report.exit_code != 0)):
        problems.append(no_head)  # that a killed rank tore its last line is no news
    life = _life(report, box) if lives is None else lives.get(rank)
    return RankSeen(rank, report, box, life, problems=tuple(problems)), head


def _gaps(seen: RankSeen, boxes: bool) -> list[str]:
    """What should be there of a rank and is not."""
    if seen.problems or seen.alive or seen.cut:
        return []
    if seen.report is None and seen.box is None:
        gone = f"rank {seen.rank} left nothing: it never started, or its files were removed"
        return [] if seen.status is not None else [gone]
    if seen.box is None and boxes:
        return [f"rank {seen.rank} has no black box"]
    if seen.ended is None and not seen.silent:
        if seen.contents is not None and seen.contents.live.state in LEFT:
            return [f"rank {seen.rank} ended itself, but its report is missing: why is not known"]
        return [f"rank {seen.rank} wrote no end, and this host cannot tell whether it lives"]
    return []


def _life(report: Report | None, box: BoxSeen | None) -> Life | None:
    """Whether the process, the same one, still is: pid and start time together name it."""
    if box is None or (report is not None and report.host not in (None, socket.gethostname())):
        return None
    pid = box.contents.pid
    try:
        raw = b""
        with open(f"/proc/{pid}/stat", "rb") as stream:
            raw = stream.read()
        if start_ticks(pid) != box.start_ticks:
            return Life.GONE
    except OSError:
        return Life.GONE
    letter = raw[raw.rindex(b")") + 2 :][:1]
    return Life.GONE if letter in b"ZX" else Life.STOPPED if letter == b"T" else Life.ALIVE


def _of_one_job(ranks: dict[int, RankSeen], jobs: Mapping[int, str]) -> dict[int, RankSeen]:
    """Ranks whose records name another job, or which know a group by other members, are not of this one."""
    groups: dict[str, dict[int, str]] = {}
    for rank, seen in ranks.items():
        for group in seen.contents.groups if seen.contents else ():
            groups.setdefault(group.name, {})[rank] = str(group.ranks)
    for words in (jobs, *groups.values()):
        ranked = Counter(words.values()).most_common()
        if len(ranked) < 2:
            continue
        tied = ranked[0][1] == ranked[1][1]
        for rank, word in words.items():
            if tied or word != ranked[0][0]:
                why = f"rank {rank} is of another job than the others" + (", or they are of another" if tied else "")
                ranks[rank] = RankSeen(rank, problems=(*ranks[rank].problems, why))
    return ranks


def _strangers(ranks: Mapping[int, RankSeen], expected: int) -> list[int]:
    """Ranks beyond those of the configuration, whom no rank of it knows."""
    known = {
        member
        for rank, seen in ranks.items()
        if rank < expected and seen.contents
        for group in seen.contents.groups
        for member in group.ranks
    }
    return [rank for rank in ranks if expected and rank >= expected and rank not in known]


def _same_processes(referee: RefereeSaid, ranks: Mapping[int, RankSeen]) -> bool:
    """Not one rank that both know may have another process."""
    known = {rank: seen.contents.pid for rank, seen in ranks.items() if seen.contents}
    known |= {rank: seen.report.pid for rank, seen in ranks.items() if seen.report and seen.report.pid}
    return all(referee.pids[rank] == pid for rank, pid in known.items() if rank in referee.pids)
