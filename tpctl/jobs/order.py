"""`order.json`: what an operator wants the supervisor to do. The last one counts; it stays until the job is over."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from tpctl.errors import JobError
from tpctl.jobs.record import read_json, write_json

SCHEMA, SCHEMA_VERSION = "tpctl.order", 1


class Kind(StrEnum):
    DRAIN = "drain"
    ABORT = "abort"


class OnDeadline(StrEnum):
    """What a drain does when its deadline passes: end the job, or leave it to its own deadline and say so."""

    abort = "abort"
    fail = "fail"


@dataclass(frozen=True)
class Order:
    """`asked_ns` is this host's monotonic clock: a clock that is set back does not move the deadline."""

    id: str
    kind: Kind
    why: str
    by: str
    asked_ns: int
    deadline_s: float = 30.0
    on_deadline: OnDeadline = OnDeadline.abort

    @classmethod
    def make(
        cls,
        kind: Kind,
        why: str,
        by: str = "operator",
        deadline_s: float = 30.0,
        on_deadline: OnDeadline = OnDeadline.abort,
    ) -> Order:
        return cls(uuid.uuid4().hex, kind, why, by, time.monotonic_ns(), deadline_s, on_deadline)

    def age_s(self) -> float:
        return (time.monotonic_ns() - self.asked_ns) / 1e9

    def overdue(self) -> bool:
        return self.age_s() > self.deadline_s

    def write(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)})


def read_order(path: Path) -> Order | None:
    """The order in force; None where there is none, or none that this version understands."""
    try:
        data = read_json(path)
        if (data.pop("schema"), data.pop("schema_version")) != (SCHEMA, SCHEMA_VERSION):
            return None
        data |= {"kind": Kind(data["kind"]), "on_deadline": OnDeadline(data["on_deadline"])}
        return Order(**data)
    except (JobError, KeyError, TypeError, ValueError):
        return None
