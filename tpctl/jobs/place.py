"""Where jobs keep their state: one directory a job, for its owner alone.

STATE/jobs/NAME/            0700
  job.json                  who runs it, every attempt, how it ended
  lock                      held by the supervisor while it lives
  config.toml timeline.toml the configuration, frozen
  control.sock              of rank 0, while it runs
  order.json answer.json    what was asked for last; what came of the end of a drain before its time
  supervisor.log
  attempts/N/               the run directory of each attempt: rank reports, logs, black boxes, records, outputs
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from tpctl.errors import JobError, NoJobError
from tpctl.nearest import hint

STATE_VARIABLE = "TPCTL_STATE_DIR"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# What the kernel takes for the address of a unix socket, less its closing zero.
MAX_SOCKET_BYTES = 107
MODE = 0o700


@dataclass(frozen=True)
class JobDir:
    """The files of one job. Making one says nothing about whether the job exists."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record(self) -> Path:
        return self.path / "job.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.toml"

    @property
    def socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def order(self) -> Path:
        return self.path / "order.json"

    @property
    def answer(self) -> Path:
        return self.path / "answer.json"

    @property
    def log(self) -> Path:
        return self.path / "supervisor.log"

    def run_dir(self, attempt: int) -> Path:
        return self.path / "attempts" / str(attempt)


def jobs_root() -> Path:
    """`$TPCTL_STATE_DIR/jobs`, else the platform's place for state. It may not exist."""
    import platformdirs

    chosen = os.environ.get(STATE_VARIABLE)
    return (Path(chosen) if chosen else Path(platformdirs.user_state_dir("tpctl"))).absolute() / "jobs"


def names() -> list[str]:
    """Every job that has a directory, alive or not."""
    try:
        found = [path.name for path in jobs_root().iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(name for name in found if NAME.fullmatch(name))


def find(name: str) -> JobDir:
    """The directory of a job that exists.

    Raises:
        NoJobError: there is none, with the nearest name.
        JobError: it is somebody else's, or open to others.
    """
    check_name(name)
    job = JobDir(jobs_root() / name)
    if not job.path.is_dir():
        raise NoJobError(
            f"there is no job '{name}'{hint(name, names())}",
            evidence={"looked_in": job.path.parent},
        )
    check_owner(job.path)
    return job


def check_name(name: str) -> None:
    """Raises JobError for what cannot name a job."""
    if not NAME.fullmatch(name):
        raise JobError(
            f"a job's name is 1 to 63 letters, digits, dots, dashes and underscores, and begins with a letter "
            f"or a digit; got {name!r}",
            code="TP-7611",
            next_step="tpctl up --name preview",
        )


def check_owner(path: Path) -> None:
    """Whoever can write here can stand in for the job: its directory must be ours alone."""
    stat = path.stat()
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
        raise JobError(
            f"{path} must belong to this user alone: its owner is {stat.st_uid}, its mode {stat.st_mode & 0o777:04o}",
            code="TP-7612",
            evidence={"uid": os.geteuid()},
            next_step=f"chmod 0700 {path}",
        )


def check_socket(job: JobDir) -> None:
    """Raises JobError if the kernel would refuse the address of the job's socket."""
    size = len(os.fsencode(job.socket))
    if size > MAX_SOCKET_BYTES:
        raise JobError(
            f"the control socket's path is {size} bytes long, and the kernel takes {MAX_SOCKET_BYTES}: {job.socket}",
            code="TP-7613",
            next_step=f"a shorter --name, or {STATE_VARIABLE}=/run/user/{os.geteuid()}/tpctl",
        )


def free_name(stem: str) -> str:
    """`stem-1`, or with the first number that no job has."""
    taken = set(names())
    number = 1
    while f"{stem}-{number}" in taken:
        number += 1
    return f"{stem}-{number}"


def make(name: str) -> JobDir:
    """A new job's directory.

    Raises:
        FileExistsError: there is one of that name; what it is, is the caller's question.
        JobError: the name, or the length of its socket's path, will not do.
    """
    check_name(name)
    job = JobDir(jobs_root() / name)
    check_socket(job)
    job.path.parent.mkdir(mode=MODE, parents=True, exist_ok=True)
    job.path.mkdir(mode=MODE)
    job.path.chmod(MODE)  # whatever the umask
    return job


def lock(job: JobDir) -> int | None:
    """The job's lock as a file descriptor that this process now holds; None if another process holds it.

    The kernel gives it back when its last holder ends, however that ends.
    """
    descriptor = os.open(job.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def remove(job: JobDir) -> None:
    """A job's directory and all in it. The name is free before the files are gone."""
    grave = job.path.with_name(f".{job.name}.{uuid.uuid4().hex[:8]}")
    job.path.rename(grave)
    shutil.rmtree(grave)
