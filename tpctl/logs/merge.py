"""One order for the lines of many logs: cause before effect, and never two lines of one writer swapped. Pure.

On one host all ranks share a monotonic clock, and it decides; a writer that tells the time of day is placed on it by
what the ranks say of both. With several hosts no clock is shared: the call_id is, since a frame is worked on everywhere
after it was sent, and among lines of one call the time of day decides. Who works on no call is placed by rank 0's. A
line without any time goes with the line before it in its own log.
"""

from __future__ import annotations

import bisect
import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence

from tpctl.logs.entry import Entry

Key = tuple[float, float]


class Merger:
    """Orders what each poll brought.

    Args:
        offset_ns: of the monotonic clock against the time of day, until the ranks' lines tell their own.
    """

    def __init__(self, offset_ns: float = 0.0) -> None:
        self._offset_ns = offset_ns
        self._learned = False
        self._calls: list[tuple[float, int]] = []  # rank 0's: since when it worked on which
        self._newest: dict[str, Key] = {}
        self._held: dict[str, list[Entry]] = {}
        self.hosts: set[str] = set()

    def take(self, batches: Mapping[str, Sequence[Entry]], until_ns: int | None = None) -> list[Entry]:
        """The lines that came, in order; with `until_ns`, those of the monotonic clock up to then. The rest is kept for
        the next time: another writer's line from before it may still be on its way."""
        for source, entries in batches.items():
            self._held.setdefault(source, []).extend(entries)
        self._learn(entry for entries in self._held.values() for entry in entries)
        keyed = {source: self._keyed(source, entries) for source, entries in self._held.items()}
        ready: list[list[tuple[Key, str, int, Entry]]] = []
        for source, rows in keyed.items():
            count = len(rows)
            if until_ns is not None and len(self.hosts) < 2:
                count = next((n for n, (key, *_) in enumerate(rows) if key[0] > until_ns), count)
            ready.append(rows[:count])
            self._held[source] = self._held[source][count:]
            if count:
                self._newest[source] = rows[count - 1][0]
        return [entry for *_, entry in heapq.merge(*ready, key=lambda row: row[:3])]

    def _learn(self, entries: Iterable[Entry]) -> None:
        both = [e for e in entries if e.mono_ns is not None and e.unix_s is not None]
        self.hosts |= {entry.host for entry in both if entry.host is not None}
        if both and not self._learned:
            self._offset_ns = statistics.median(e.mono_ns - e.unix_s * 1e9 for e in both)  # type: ignore[operator]
            self._learned = True
        for entry in both:
            call_id = entry.ids.get("call_id")
            if entry.rank == 0 and call_id is not None and (not self._calls or call_id > self._calls[-1][1]):
                self._calls.append((entry.unix_s or 0.0, call_id))

    def _keyed(self, source: str, entries: Sequence[Entry]) -> list[tuple[Key, str, int, Entry]]:
        """Keys that never fall within one source: its own order stays, whatever its clocks do."""
        newest = self._newest.get(source, (float("-inf"), float("-inf")))
        rows = []
        for number, entry in enumerate(entries):
            key = self._key(entry)
            newest = (max(newest[0], key[0]), max(newest[1], key[1])) if key is not None else newest
            rows.append((newest, source, number, entry))
        return rows

    def _key(self, entry: Entry) -> Key | None:
        if entry.unix_s is None:
            return None
        if len(self.hosts) < 2:
            return (entry.mono_ns if entry.mono_ns is not None else entry.unix_s * 1e9 + self._offset_ns, 0.0)
        call_id = entry.ids.get("call_id")
        if call_id is None and entry.rank is None:
            place = bisect.bisect_right(self._calls, (entry.unix_s, float("inf")))
            call_id = self._calls[place - 1][1] if place else None
        return (float("-inf") if call_id is None else call_id, entry.unix_s)
