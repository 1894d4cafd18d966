"""Compares the ranks' collectives place by place, while they run. What agrees is forgotten at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.blackbox import COLLECTIVE_KEY, Collective, Members, unpack_collective
from engine.referee.snapshot import Difference, Seat

# A rank may run ahead of its peers by as many collectives before the oldest are forgotten.
MAX_OPEN = 65536
# How many places are kept for other hosts' ranks to be compared with, and how many of their collectives to compare.
MAX_KEPT = 8192
MAX_SAMPLES = 2048

Key = tuple[bytes, bytes]  # group name, place


class Ledgers:
    """Packed records by group and place, until every local member of the group has entered the place alike.

    With `keep`, what the local ranks did last is kept, and `meet` compares it with what other hosts' ranks did. These
    are samples, one a summary: whoever is blocked at a place is sampled there; of those who go on, some are.
    While not `complete`, more local ranks are to come, and nothing is forgotten before its time.
    """

    def __init__(self, ranks: Sequence[int], *, complete: bool = True, keep: bool = False) -> None:
        self._ranks = frozenset(ranks)
        self._complete = complete
        self._keep = keep
        self._groups: dict[str, Members] = {}
        self._open: dict[Key, dict[int, bytes]] = {}
        self._clashes: dict[Key, dict[int, bytes]] = {}
        self._kept: dict[Key, dict[int, bytes]] = {}
        self._samples: dict[Key, dict[int, Collective]] = {}
        self._far: dict[Key, Difference] = {}
        self._local: dict[bytes, int] = {}
        self.last: dict[int, bytes] = {}
        self.compared = 0

    def know(self, groups: Iterable[Members]) -> None:
        """To be told of a group before its first record: how many of its members are here."""
        for group in groups:
            self._groups[group.name] = group
            self._local[_name(group.name)] = len(self._ranks.intersection(group.ranks))

    def adopt(self, ranks: Sequence[int], *, complete: bool) -> None:
        """The local ranks known by now."""
        self._ranks, self._complete = frozenset(ranks), complete
        self.know(list(self._groups.values()))
        if complete:
            for key, entered in list(self._open.items()):
                if len(entered) == self._local.get(key[0]) and key not in self._clashes:
                    del self._open[key]

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
                if self._keep:
                    self._kept[key] = entered
                    if len(self._kept) > MAX_KEPT:
                        del self._kept[next(iter(self._kept))]
            elif raw[hash_at] != next(iter(entered.values()))[hash_at]:
                self._clashes[key] = entered
            entered[rank] = raw
            self.compared += 1
            if self._complete and len(entered) == self._local.get(raw[group_at]) and key not in self._clashes:
                del self._open[key]
        if records:
            self.last[rank] = records[-1]

    def meet(self, seats: Iterable[Seat]) -> None:
        """The last collective of each rank of another host, to be compared where local ranks have been or will be."""
        for seat in seats:
            entry = seat.last
            group = self._groups.get(entry.group) if entry is not None else None
            # Groups of one name and other members are other groups.
            if entry is None or group is None or seat.groups.get(entry.group) != group:
                continue
            key = (_name(entry.group), entry.place.to_bytes(8, "little"))
            self._samples.setdefault(key, {})[seat.rank] = entry
            if len(self._samples) > MAX_SAMPLES:
                del self._samples[next(iter(self._samples))]
        for key, samples in list(self._samples.items()):
            entered = self._kept.get(key, {})
            hashes = {entry.hash_u64 for entry in samples.values()}
            hashes |= {int.from_bytes(raw[COLLECTIVE_KEY[1]], "little") for raw in entered.values()}
            if len(hashes) > 1:
                calls = {rank: unpack_collective(raw) for rank, raw in entered.items()} | samples
                first = next(iter(samples.values()))
                self._far[key] = Difference(self._groups[first.group], first.place, dict(sorted(calls.items())))
            elif entered and self._local.get(key[0]) == len(entered):
                del self._samples[key]

    def differences(self, seats: Mapping[int, Seat]) -> tuple[Difference, ...]:
        """Where ranks entered different things."""
        found = list(self._far.values())
        for key, entered in self._clashes.items():
            if key in self._far:
                continue
            calls = {rank: unpack_collective(raw) for rank, raw in sorted(entered.items())}
            first = next(iter(calls))
            if first in seats:
                found.append(Difference(seats[first].groups[calls[first].group], calls[first].place, calls))
        return tuple(found)


def _name(group: str) -> bytes:
    return group.encode()[:16].ljust(16, b"\0")
