"""What a command is pointed at: the run directory of a run, or a job by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tpctl.errors import RunError
from tpctl.evidence import find_runs
from tpctl.jobs import place
from tpctl.jobs.place import JobDir
from tpctl.jobs.record import JobRecord
from tpctl.nearest import hint

TargetArgument = Annotated[
    str, typer.Argument(help="A run directory, or a job's name; tpctl ps lists them.", metavar="RUN|JOB")
]


@dataclass(frozen=True)
class Target:
    """`job` is None for a run that is no attempt of a job, or was named by its directory."""

    name: str
    run_dir: Path
    job: JobDir | None = None
    attempt: int | None = None


def find_target(text: str, attempt: int | None = None) -> Target:
    """A run directory if there is such a directory, else the last attempt of a job, or the one asked for.

    Raises:
        RunError: neither; a directory of several runs; a job that has no such attempt.
        JobError: the job cannot be read.
    """
    if Path(text).is_dir():
        runs = find_runs(Path(text))
        if len(runs) > 1:
            some = ", ".join(run.name for run in runs[:6])
            raise RunError(
                f"{text} holds {len(runs)} runs; name one of them: {some}{', ...' if len(runs) > 6 else ''}",
                code="TP-7801",
                where=text,
                next_step=f"ls {text}",
            )
        return Target(runs[0].name, runs[0])
    known = place.names()
    if not place.NAME.fullmatch(text) or text not in known:
        raise RunError(
            f"there is neither a run directory nor a job '{text}'{hint(text, known)}",
            code="TP-7800",
            evidence={"jobs_in": place.jobs_root()},
            next_step="tpctl ps --all",
        )
    job = place.find(text)
    record = JobRecord.read(job.record)
    number = attempt if attempt is not None else len(record.attempts) - 1
    if not 0 <= number < len(record.attempts):
        had = f"it has had {len(record.attempts)}" if record.attempts else "its ranks were never started"
        raise RunError(
            f"job '{text}' has no attempt {max(number, 0)}: {had}",
            code="TP-7804",
            where=str(job.path),
            next_step=f"tpctl status {text}",
        )
    return Target(text, job.run_dir(number), job, number)
