"""Who keeps a job from ending: each rank that still lives, where it is, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpctl.jobs.observe import RankSeen


@dataclass(frozen=True)
class Blocker:
    """`age_s` since its last commitment point, `after`; None before the first."""

    rank: int
    state: str
    phase: str
    after: str | None
    age_s: float | None
    stopped: bool

    @classmethod
    def of(cls, rank: RankSeen, now_ns: int) -> Blocker:
        last = rank.last
        return cls(
            rank.rank,
            rank.state.value,
            rank.phase,
            last.action if last is not None else None,
            round((now_ns - last.t_ns) / 1e9, 3) if last is not None else None,
            rank.letter in ("T", "t"),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        stopped = ", stopped by a signal" if self.stopped else ""
        phase = f", in {self.phase}" if self.phase else ""
        where = f", after '{self.after}' {self.age_s:.1f} s ago" if self.age_s is not None else ""
        return f"rank {self.rank}: {self.state}{stopped}{phase}{where}"


def blockers(ranks: Sequence[RankSeen], now_ns: int) -> list[Blocker]:
    """Of the ranks that live; stopped ones first, since the others may wait for them."""
    found = [Blocker.of(rank, now_ns) for rank in ranks if rank.alive]
    return sorted(found, key=lambda blocker: (not blocker.stopped, blocker.rank))
