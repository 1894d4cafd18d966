"""`order.json`: what an operator wants the supervisor to do. The last one counts; it stays until the job is over."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from tpctl.errors import JobError
from tpctl.jobs.record import read_json, write_json

SCHEMA, ANSWER_SCHEMA, SCHEMA_VERSION = "tpctl.order", "tpctl.answer", 1


class Kind(StrEnum):
    DRAIN = "drain"
    ABORT = "abort"
    TAKE_BACK = "take-back"  # a drain, before its point of no return


class OnDeadline(StrEnum):
    """What a drain does when its deadline passes: end the job; take the drain back, so that the stream goes on; or
    leave the job to its own deadline and say so."""

    abort = "abort"
    resume = "resume"
    fail = "fail"


@dataclass(frozen=True)
class Order:
    """`asked_ns` is this host's monotonic clock: a clock that is set back does not move the deadline. `instead` names
    the order that this one took the place of, which the supervisor may not have read."""

    id: str
    kind: Kind
    why: str
    by: str
    asked_ns: int
    deadline_s: float = 30.0
    on_deadline: OnDeadline = OnDeadline.abort
    instead: str | None = None

    @classmethod
    def make(
        cls,
        kind: Kind,
        why: str,
        by: str = "operator",
        deadline_s: float = 30.0,
        on_deadline: OnDeadline = OnDeadline.abort,
        instead: str | None = None,
    ) -> Order:
        return cls(uuid.uuid4().hex, kind, why, by, time.monotonic_ns(), deadline_s, on_deadline, instead)

    def age_s(self) -> float:
        return (time.monotonic_ns() - self.asked_ns) / 1e9

    def overdue(self) -> bool:
        return self.age_s() > self.deadline_s

    def write(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)})


@dataclass(frozen=True)
class Answer:
    """`answer.json`: the drain of order `id` is taken back, or why it is not. `why` it was, where nobody asked."""

    id: str
    refused: str | None = None
    why: str | None = None

    def write(self, path: Path) -> None:
        write_json(path, {"schema": ANSWER_SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)})


def read_answer(path: Path) -> Answer | None:
    """The last answer; None where there is none, or none that this version understands."""
    try:
        data = read_json(path)
        if (data.pop("schema"), data.pop("schema_version")) != (ANSWER_SCHEMA, SCHEMA_VERSION):
            return None
        return Answer(**data)
    except (JobError, KeyError, TypeError):
        return None


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
