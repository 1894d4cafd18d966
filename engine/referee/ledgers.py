"""Compares the ranks' collectives place by place, while they run. What agrees is forgotten at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.blackbox import COLLECTIVE_KEY, Members, unpack_collective
from engine.referee.snapshot import Difference, Seat

# A rank may run ahead of its peers by as many collectives before the oldest are forgotten.
MAX_OPEN = 65536

Key = tuple[bytes, bytes]  # group name, place


class Ledgers:
    """Packed records by group and place, until every local member of the group has entered the place alike."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = frozenset(ranks)
        self._open: dict[Key, dict[int, bytes]] = {}
        self._clashes: dict[Key, dict[int, bytes]] = {}
        self._local: dict[bytes, int] = {}
        self.last: dict[int, bytes] = {}
        self.compared = 0

    def know(self, groups: Iterable[Members]) -> None:
        """To be told of a group before its first record: how many of its members are here."""
        for group in groups:
            self._local[group.name.encode().ljust(16, b"\0")] = len(self._ranks.intersection(group.ranks))

    def add(self, rank: int, records: Sequence[bytes]) -> None:
        """New collectives of a rank, oldest first."""
        place_at, hash_at, group_at = COLLECTIVE_KEY
        for raw in records:
            key = (raw[group_at], raw[place_at])
            entered = self._open.get(key)
            if entered is None:
                entered = self._open[key] = {}
                if len(self._open) > MAX_OPEN:
                    del self._open[next(iter(self._open))]
            elif raw[hash_at] != next(iter(entered.values()))[hash_at]:
                self._clashes[key] = entered
            entered[rank] = raw
            self.compared += 1
            if len(entered) == self._local.get(raw[group_at]) and key not in self._clashes:
                del self._open[key]
        if records:
            self.last[rank] = records[-1]

    def differences(self, seats: Mapping[int, Seat]) -> tuple[Difference, ...]:
        """Where ranks entered different things."""
        found = []
        for entered in self._clashes.values():
            calls = {rank: unpack_collective(raw) for rank, raw in sorted(entered.items())}
            first = next(iter(calls))
            if first in seats:
                found.append(Difference(seats[first].groups[calls[first].group], calls[first].place, calls))
        return tuple(found)
