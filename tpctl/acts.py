"""The last acts of all ranks in one order: by what was shared, never by clocks.

Collectives are made by all members of a group alike, so their number is a clock that all ranks share. An act stands
after as many collectives as its rank had entered by then. Within one rank, its own sequence decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.blackbox import Collective, Commitment, Contents
from tpctl.evidence import Seen

LAST = 4  # acts of each rank


@dataclass(frozen=True)
class Act:
    """`after` counts the collectives, of the groups that all ranks share, that the rank had entered by then."""

    after: int
    rank: int
    what: str
    group: str
    call_id: int
    chunk_index: int

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def last_acts(seen: Seen) -> list[Act]:
    """The last acts of every rank whose black box can be read."""
    boxes = {rank.rank: rank.contents for rank in seen.ranks if rank.contents}
    if not boxes:
        return []
    shared = set.intersection(*({group.name for group in box.groups} for box in boxes.values()))
    acts = [act for rank, box in boxes.items() for act in _of_rank(rank, box, shared)]
    return sorted(acts, key=lambda act: act.after)  # stable: a rank's own order stays


def _of_rank(rank: int, box: Contents, shared: set[str]) -> list[Act]:
    names = {group.name: count for group, count in zip(box.groups, box.live.counts, strict=True)}
    after = sum(count for name, count in names.items() if name in shared)
    entries: list[Commitment | Collective] = [*box.commitments, *box.collectives]
    # One process, one monotonic clock: the two rings of a rank may be merged by it.
    latest = sorted(entries, key=lambda entry: entry.t_ns, reverse=True)[:LAST]
    acts = []
    for entry in latest:
        if isinstance(entry, Collective):
            what = f"{entry.op} {entry.what} at {entry.site}"
            acts.append(Act(after, rank, what, f"{entry.group} {entry.place}", entry.call_id, entry.chunk_index))
            after -= entry.group in shared
        else:
            acts.append(Act(after, rank, entry.action, entry.group, entry.call_id, entry.chunk_index))
    return acts[::-1]
