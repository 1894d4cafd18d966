"""The last acts of all ranks in one order: by what was shared, never by clocks.

Collectives are made by all members of a group alike, so where all ranks are in one group, their number is a clock that
all share: an act stands after as many collectives as its rank had entered by then. Where they are not, as when rank 0
stands outside the mesh, the call_id is what they share. Within one rank, its own sequence decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.blackbox import Collective, Commitment, Contents
from tpctl.evidence import Seen

LAST = 4  # acts of each rank


@dataclass(frozen=True)
class Act:
    """`after` counts the collectives that the rank had entered by then in groups of all ranks; else it is a call_id."""

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
    everyone = set(boxes)
    shared = set.intersection(
        *({group.name for group in box.groups if everyone <= set(group.ranks)} for box in boxes.values())
    )
    by_call = any(count and name not in shared for box in boxes.values() for name, count in _counts(box).items())
    acts = [act for rank, box in boxes.items() for act in _of_rank(rank, box, set() if by_call else shared)]
    return sorted(acts, key=lambda act: act.after)  # stable: a rank's own order stays


def _counts(box: Contents) -> dict[str, int]:
    return {group.name: count for group, count in zip(box.groups, box.live.counts, strict=True)}


def _of_rank(rank: int, box: Contents, shared: set[str]) -> list[Act]:
    after = sum(count for name, count in _counts(box).items() if name in shared)
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
    if shared:
        return acts[::-1]
    call_id, ordered = -1, []
    for act in acts[::-1]:
        call_id = max(call_id, act.call_id)
        ordered.append(replace(act, after=call_id))
    return ordered
