"""The KV audit: chunk records of all ranks, compared key by key. Pure: rows in, findings out.

Only equal keys are compared: (job, epoch, chunk, layer, algorithm). What one rank alone recorded reduces the coverage;
it is never a pass. With three or more ranks a strict majority names the odd ones; with two, the difference is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.records import FIELDS, IDENTITY, LAYER_FIELDS

KEPT = 20  # differences kept in full; the rest is counted
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Divergence:
    """One field of one chunk that differs. `layer` is None for what a chunk has once; `odd` may be empty."""

    chunk_index: int
    cache_epoch: int | None
    call_id: int | None
    layer: int | None
    field: str
    by_rank: Mapping[int, Any]
    odd: tuple[int, ...]

    def sentence(self) -> str:
        where = f"chunk {self.chunk_index}" + ("" if self.layer is None else f", layer {self.layer}")
        values = ", ".join(f"rank {rank} = {value}" for rank, value in self.by_rank.items())
        blame = f"; the odd one out: rank {', '.join(map(str, self.odd))}" if self.odd else ""
        return f"{where}: {self.field} differs: {values}{blame}"

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "by_rank": {str(rank): value for rank, value in self.by_rank.items()},
            "odd": list(self.odd),
            "sentence": self.sentence(),
        }


class Auditor:
    """Takes rows as they come, in any order over ranks, and keeps only what still waits for a rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.compared = 0  # rows that met the same key of another rank
        self.keys = 0  # keys that all ranks held
        self.values = 0  # values compared
        self.differences = 0
        self.divergences: list[Divergence] = []
        self.rows: Counter[int] = Counter()
        self._waiting: dict[tuple[int, int], dict[int, Row]] = {}

    def add(self, rank: int, row: Row) -> list[Divergence]:
        """One row of one rank; what it makes complete is compared at once, and what differs is returned."""
        self.rows[rank] += 1
        key = (row["cache_epoch"], row["chunk_index"])
        waiting = self._waiting.setdefault(key, {})
        waiting[rank] = row
        if len(waiting) < self.ranks:
            return []
        self.keys += 1
        return self._compare(self._waiting.pop(key))

    def close(self) -> list[Divergence]:
        """After the last row: what never met all ranks is compared as far as it goes.

        Rows of one call under different keys have left the plan in the key itself: that is a difference too.
        """
        found = []
        calls: dict[int, dict[int, Row]] = {}
        for rows in self._waiting.values():
            if len(rows) > 1:
                found += self._compare(rows)
            for rank, row in rows.items():
                calls.setdefault(row["call_id"], {})[rank] = row
        for call_id, rows in sorted(calls.items()):
            if len({(row["cache_epoch"], row["chunk_index"]) for row in rows.values()}) > 1:
                self.compared += sum(1 for rank in rows if not self._met(rank, rows[rank]))
                for name in ("cache_epoch", "chunk_index"):
                    found += self._field(rows, name, {rank: row[name] for rank, row in rows.items()}, call_id=call_id)
        self._waiting.clear()
        return found

    @property
    def first(self) -> Divergence | None:
        """Of the lowest chunk; there, the key's own fields first, then the plan's, then the layers'."""
        return min(self.divergences, key=lambda d: (d.chunk_index, d.field not in IDENTITY, d.layer or 0), default=None)

    def expected(self, chunks_known: int) -> int:
        """Rows that should have met: of every chunk anybody knows of, one from each rank."""
        return max(chunks_known, *self.rows.values(), 0) * self.ranks if self.rows else chunks_known * self.ranks

    def _met(self, rank: int, row: Row) -> bool:
        rows = self._waiting[(row["cache_epoch"], row["chunk_index"])]
        return rank in rows and len(rows) > 1

    def _compare(self, rows: Mapping[int, Row]) -> list[Divergence]:
        self.compared += len(rows)
        ordered = dict(sorted(rows.items()))
        found = []
        for name in FIELDS:
            found += self._field(ordered, name, {rank: row.get(name) for rank, row in ordered.items()})
        layers = len(next(iter(ordered.values()))[LAYER_FIELDS[0]])
        for layer in range(layers):
            for name in LAYER_FIELDS:
                values = {rank: row[name][layer] for rank, row in ordered.items()}
                found += self._field(ordered, name, values, layer=layer)
        return found

    def _field(
        self,
        rows: Mapping[int, Row],
        name: str,
        values: Mapping[int, Any],
        *,
        layer: int | None = None,
        call_id: int | None = None,
    ) -> list[Divergence]:
        self.values += 1
        if len({repr(value) for value in values.values()}) == 1:
            return []
        lowest = min(rows.values(), key=lambda row: row["chunk_index"])
        epochs = {row["cache_epoch"] for row in rows.values()}
        calls = {row["call_id"] for row in rows.values()} if call_id is None else {call_id}
        found = Divergence(
            lowest["chunk_index"],
            epochs.pop() if len(epochs) == 1 else None,
            calls.pop() if len(calls) == 1 else None,
            layer,
            name,
            dict(sorted(values.items())),
            odd_ones(values),
        )
        self.differences += 1
        if len(self.divergences) < KEPT:
            self.divergences.append(found)
        return [found]


def odd_ones(values: Mapping[int, Any]) -> tuple[int, ...]:
    """Ranks against a strict majority of the same value; none without one."""
    counts = Counter(repr(value) for value in values.values())
    word, count = counts.most_common(1)[0]
    if count * 2 <= len(values):
        return ()
    return tuple(sorted(rank for rank, value in values.items() if repr(value) != word))
