"""`job.json`: who runs a job, its attempts, and how it ended. Written by its supervisor alone, replaced atomically."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.process import Process
from tpctl.errors import JobError

SCHEMA, SCHEMA_VERSION = "tpctl.job", 1
# How a job ends. `drained` on demand; `finished` with the last chunk of a stream that has an end.
ENDINGS = ("drained", "finished", "failed", "aborted")


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks. Times are Unix seconds. `tag` marks every process of it."""

    number: int
    tag: str
    started_at: float
    launcher: Process | None = None
    ended_at: float | None = None
    returncode: int | None = None
    reason: str | None = None
    leftovers: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobRecord:
    """What the supervisor knows. `job_id` is another for each `up`; `boot` tells whether process ids still count."""

    name: str
    job_id: str
    host: str
    boot: str
    created_at: float
    world_size: int
    tp_plan: str
    parity_key: str
    restart: str = "no"
    max_restarts: int = 0
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None  # HOST:PORT, where the hosts of the job meet
    supervisor: Process | None = None
    attempts: tuple[Attempt, ...] = field(default=())
    first_attempt: int = 0  # since the operator last started it: the attempts before it do not count as restarts
    backoff_until: float | None = None
    draining: str | None = None  # why
    ending: str | None = None
    ended_at: float | None = None
    metrics_port: int | None = None  # on 127.0.0.1, where it was asked for; 0 until one is found

    @property
    def metrics_url(self) -> str | None:
        """Where its supervisor serves its metrics; None where nobody asked for that."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics" if self.metrics_port else None

    @property
    def attempt(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def ranks_here(self) -> range:
        """The global ranks that this host runs: all hosts run as many."""
        here = self.world_size // self.nnodes
        return range(self.node_rank * here, (self.node_rank + 1) * here)

    @property
    def restarts(self) -> int:
        return max(0, len(self.attempts) - self.first_attempt - 1)

    def write(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> JobRecord:
        """Raises JobError: none, damaged, or of a newer version."""
        data = read_json(path)
        if data.get("schema") != SCHEMA:
            raise JobError(f"{path} is no record of a job", code="TP-7614", where=str(path))
        if data.get("schema_version") != SCHEMA_VERSION:
            raise JobError(
                f"{path} has version {data.get('schema_version')!r} of a job's record; this tool reads "
                f"{SCHEMA_VERSION}",
                code="TP-7615",
                where=str(path),
            )
        try:
            fields = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            fields["supervisor"] = _process(fields["supervisor"])
            fields["attempts"] = tuple(
                Attempt(**{**one, "launcher": _process(one["launcher"]), "leftovers": tuple(one["leftovers"])})
                for one in fields["attempts"]
            )
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise JobError(f"{path} is damaged: {error!r}", code="TP-7614", where=str(path)) from error


def _process(data: dict[str, Any] | None) -> Process | None:
    return None if data is None else Process.from_dict(data)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a file of JSON whole; for its owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, allow_nan=False)
        stream.write("\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises JobError: missing, or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}", code="TP-7614", where=str(path)) from error
    except ValueError as error:
        raise JobError(f"{path} is damaged: no JSON", code="TP-7614", where=str(path)) from error
    if not isinstance(data, dict):
        raise JobError(f"{path} is damaged: no object", code="TP-7614", where=str(path))
    return data
