"""What a bundle is made of: a job by its name, or a run directory by its path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpctl.errors import RunError
from tpctl.evidence import find_runs, is_run
from tpctl.jobs import place
from tpctl.jobs.place import JobDir


@dataclass(frozen=True)
class Source:
    """`runs` are (label, directory) pairs, the most telling first: of a job its last attempt."""

    name: str
    job: JobDir | None
    runs: tuple[tuple[str, Path], ...]

    @property
    def config(self) -> Path | None:
        """The configuration that all of it ran with."""
        if self.job is not None:
            return self.job.config
        return self.runs[0][1] / "config.toml" if self.runs else None


def find(target: str) -> Source:
    """A job of that name, else a directory of that path.

    Raises:
        NoJobError: neither is there.
        JobError: a job that is somebody else's.
        RunError: a directory that holds nothing of a run.
    """
    path = Path(target)
    if target not in place.names() and path.is_dir():
        runs = [path] if is_run(path) else find_runs(path)
        return Source(path.resolve().name, None, tuple((_label(run), run) for run in runs))
    if path.is_file() or len(path.parts) > 1:
        raise RunError(f"{target} is no run directory", code="TP-7501", where=target, next_step="tpctl ps --all")
    job = place.find(target)
    return Source(target, job, tuple((run.name, run) for run in attempts(job)))


def attempts(job: JobDir) -> list[Path]:
    """The attempts that there are, the last one first; of a job whose record may be lost."""
    try:
        found = [path for path in (job.path / "attempts").iterdir() if path.name.isdecimal() and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: -int(path.name))


def _label(run: Path) -> str:
    """A name that an archive can hold, whatever the directory is called."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in run.name)
    return kept.lstrip(".") or "run"
