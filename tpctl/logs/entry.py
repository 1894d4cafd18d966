"""One line of any log of a run, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from engine.log import IDS, Level


class Origin(StrEnum):
    """Who wrote it. `stderr` is what a rank printed besides its log: tracebacks, words of libraries."""

    rank = "rank"
    supervisor = "supervisor"
    launcher = "launcher"
    referee = "referee"
    stderr = "stderr"


@dataclass(frozen=True)
class Entry:
    """`unix_s` and `mono_ns` are None where the line tells no time; `source` is one file, whose own order is kept."""

    source: str
    origin: Origin
    level: Level
    message: str
    rank: int | None = None
    role: str | None = None
    event: str | None = None
    seq: int | None = None
    unix_s: float | None = None
    mono_ns: int | None = None
    host: str | None = None
    ids: Mapping[str, int | None] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False  # the line before it: time and level are that one's

    def to_dict(self) -> dict[str, Any]:
        return {
            "ts": stamp(self.unix_s) if self.unix_s is not None else None,
            "mono_ns": self.mono_ns,
            "seq": self.seq,
            "level": self.level.value,
            "origin": self.origin.value,
            "rank": self.rank,
            "role": self.role,
            "event": self.event,
            "message": self.message,
            **{name: self.ids.get(name) for name in IDS},
            "data": dict(self.data),
        }

    def line(self) -> str:
        """As a person reads it: when (UTC), who, how grave, what, of which frame."""
        when = stamp(self.unix_s)[11:23] if self.unix_s is not None else " " * 12
        who = f"rank {self.rank}" if self.rank is not None else self.origin.value
        if self.origin is Origin.stderr:
            who += " stderr"
        grave = "" if self.continues or self.level in (Level.info, Level.debug) else f"{self.level.value.upper()} "
        short = {"call_id": "call", "chunk_index": "chunk", "cache_epoch": "epoch"}
        known = [f"{short[name]} {value}" for name in IDS if (value := self.ids.get(name)) is not None and value >= 0]
        frame = f"  ({', '.join(known)})" if known else ""
        what = f"{self.event}: " if self.event not in (None, self.level.value) else ""
        return f"{when}  {who:<10}  {grave}{what}{self.message}{frame}".rstrip()


def stamp(unix_s: float) -> str:
    """ISO 8601 in UTC, to the microsecond."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
