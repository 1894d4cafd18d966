"""What the referee knows at one moment. Plain frozen data; times are this host's monotonic clock in nanoseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.blackbox import Collective, Members
from engine.lifecycle import RankState

SETTLE_NS = 200_000_000
MAJORITY_NS = 50_000_000


class Life(StrEnum):
    """The kernel's word on a rank's process. `STOPPED` is confirmed: by job control, not by a debugger."""

    ALIVE = "alive"
    STOPPED = "stopped"
    GONE = "gone"


@dataclass(frozen=True)
class Ending:
    """What a rank wrote down about its own end. `error` is `EngineError.to_record()`, None if it drained."""

    exit_code: int
    error: Mapping[str, Any] | None = None

    @property
    def code(self) -> str:
        return str((self.error or {}).get("code", ""))

    @property
    def message(self) -> str:
        return str((self.error or {}).get("message", f"exit code {self.exit_code}"))


@dataclass(frozen=True)
class Seat:
    """One local rank. `inside` is the collective it waits in; `counts` says how many it entered, by group.

    `changed_ns` is when the process stopped or was gone, as seen by the referee; 0 while it lives. `wait_status` is
    the kernel's, where it can be read. `ending_ns` is when the referee read the ending.
    """

    rank: int
    pid: int = 0
    life: Life = Life.ALIVE
    changed_ns: int = 0
    wait_status: int | None = None
    state: RankState = RankState.RUNNING
    state_ns: int = 0
    phase: str = "B"
    ending: Ending | None = None
    ending_ns: int = 0
    inside: Collective | None = None
    last: Collective | None = None
    groups: Mapping[str, Members] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        return self.wait_status & 0x7F or None if self.wait_status is not None else None

    @property
    def finished(self) -> bool:
        """It drained: it will enter no collective any more."""
        return (self.ending is not None and self.ending.exit_code == 0) or self.state is RankState.EXITED

    @property
    def left(self) -> bool:
        """It will enter no collective any more, whatever the reason."""
        return self.life is Life.GONE or self.finished or self.state is RankState.ABORTED

    @property
    def ended_ns(self) -> int:
        """When it began to leave; 0 while it has not."""
        if self.state in (RankState.EXITED, RankState.ABORTED):
            return self.state_ns
        if self.ending is not None:
            return self.ending_ns
        return self.changed_ns if self.life is Life.GONE else 0


@dataclass(frozen=True)
class Difference:
    """At one place of one group, ranks entered different things. `entered` is by rank."""

    group: Members
    place: int
    entered: Mapping[int, Collective]


@dataclass(frozen=True)
class Snapshot:
    """The ranks. One that is in `expected` but not in `seats` was not seen yet: unknown, not healthy.

    `to_find` is how many more there are, not known by number yet. `settle_ns` is how long the true cause of an ending
    may take to show, once its victims' endings are seen; `majority_ns` how long the ranks that decide a majority may
    take to arrive at a place where others differ already. Both are longer where ranks of other hosts are in `seats`.
    """

    t_ns: int
    expected: tuple[int, ...]
    seats: Mapping[int, Seat]
    differences: tuple[Difference, ...] = ()
    to_find: int = 0
    settle_ns: int = SETTLE_NS
    majority_ns: int = MAJORITY_NS

    @property
    def all_gone(self) -> bool:
        return self.to_find == 0 and all(
            rank in self.seats and self.seats[rank].life is Life.GONE for rank in self.expected
        )
