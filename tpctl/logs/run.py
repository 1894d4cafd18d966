"""All logs of a run directory, or of one attempt of a job, read together as they grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from engine.log import log_path
from tpctl.errors import CliError
from tpctl.evidence import LAUNCHER_LOG
from tpctl.follow import box_ranks, configured_ranks, is_alive
from tpctl.jobs.observe import observe
from tpctl.jobs.record import Attempt, JobRecord
from tpctl.logs.entry import Entry, Origin
from tpctl.logs.sources import RankLog, RefereeLog, Source, SupervisorLog, TextLog
from tpctl.remains import rank_log
from tpctl.reports import read_reports
from tpctl.target import Target

TOLD = (Origin.rank, Origin.supervisor, Origin.referee, Origin.launcher)
# Clocks of supervisor and record are read one after the other.
BEFORE_S = 1.0


class RunLogs:
    """The sources that were asked for; a rank's appears when its file does.

    Args:
        ranks: only these ranks' lines, and nobody else's; None is everything.
        origins: whose lines.

    Raises:
        CliError: a rank that the run does not have.
    """

    def __init__(self, target: Target, ranks: frozenset[int] | None, origins: frozenset[Origin]) -> None:
        self.target = target
        self.run_dir = target.run_dir
        self.expected = configured_ranks(self.run_dir) or len(self._found())
        self._wanted = ranks
        self._origins = origins
        self._sources: dict[str, Source] = {}
        unknown = sorted(rank for rank in ranks or () if rank >= max(self.expected, max(self._found(), default=-1) + 1))
        if unknown:
            known = ", ".join(map(str, range(self.expected))) or "none yet"
            raise CliError(
                f"{target.name} has no rank {unknown[0]}; its ranks: {known}",
                code="TP-7811",
                where=str(self.run_dir),
                next_step=f"tpctl logs {target.name} --rank 0",
            )

    def poll(self) -> dict[str, list[Entry]]:
        """What came since the last time, by source, each in its writer's order."""
        self._look()
        return {name: source.poll() for name, source in self._sources.items()}

    @property
    def problems(self) -> list[tuple[str, str]]:
        """(source, problem): what is damaged or gone, and a rank that should have a log and has none."""
        found = [(name, problem) for name, source in self._sources.items() for problem in source.problems]
        if Origin.rank in self._origins:
            missing = [rank for rank in self.ranks if not log_path(self.run_dir, rank).exists()]
            found += [(f"rank {rank}", f"rank {rank} has no log") for rank in missing]
        return found

    @property
    def ranks(self) -> list[int]:
        """Ranks whose logs were asked for."""
        return [rank for rank in range(self.expected) if self._wanted is None or rank in self._wanted]

    def over(self) -> bool:
        """Whether nobody is left who could write another line: of this attempt, and of the job if it is one."""
        if self.target.job is not None:
            seen = observe(self.target.job)
            return seen.over or len(seen.record.attempts) - 1 != self.target.attempt
        reports = read_reports(self.run_dir)
        return not any(is_alive(self.run_dir, rank, reports.get(rank, {})) for rank in box_ranks(self.run_dir))

    def _found(self) -> list[int]:
        names = (path.name.split(".")[0].removeprefix("rank") for path in self.run_dir.glob("ranks/rank*.log.jsonl"))
        return sorted(int(name) for name in names if name.isdecimal() and len(name) < 7)

    def _look(self) -> None:
        """Take up what has appeared since."""
        run_dir, origins = self.run_dir, self._origins
        for rank in sorted({*self._found(), *range(self.expected)}):
            if self._wanted is not None and rank not in self._wanted:
                continue
            if Origin.rank in origins and log_path(run_dir, rank).exists():
                self._take(f"rank {rank}", partial(RankLog, run_dir, rank))
            printed = rank_log(run_dir, rank) if Origin.stderr in origins else None
            if printed is not None:
                self._take(f"rank {rank} stderr", partial(TextLog, printed, Origin.stderr, rank))
        if self._wanted is not None:
            return
        if Origin.launcher in origins:
            self._take("launcher", partial(TextLog, run_dir / LAUNCHER_LOG, Origin.launcher))
        if Origin.referee in origins:
            self._take("referee", partial(RefereeLog, run_dir))
        if Origin.supervisor in origins and self.target.job is not None:
            self._take("supervisor", self._supervisor)

    def _take(self, name: str, make: Callable[[], Source]) -> None:
        if name not in self._sources:
            self._sources[name] = make()

    def _supervisor(self) -> Source:
        """Its lines of this attempt; of the last one to the end."""
        assert self.target.job is not None
        attempts = JobRecord.read(self.target.job.record).attempts
        one, following = _around(attempts, self.target.attempt or 0)
        since_s = one.started_at - BEFORE_S if one.number else 0.0
        return SupervisorLog(self.target.job.log, since_s, following.started_at - BEFORE_S if following else None)


def _around(attempts: tuple[Attempt, ...], number: int) -> tuple[Attempt, Attempt | None]:
    return attempts[number], attempts[number + 1] if number + 1 < len(attempts) else None
