"""One clock for ranks of several hosts. Pure.

Ranks of one host share a monotonic clock. Those of others are placed by what binds them to it: between Stage 0 and the
mesh leader no message arrives before it was sent, which holds an offset between two limits; and the ranks of a mesh
leave phase B of a call together, since its last act is a collective. What remains open is said beside the offset.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpctl.trace.bars import Bar, Kind

# Stamps of one clock may still seem to run backwards by this much: they are read a moment after the act.
SLACK_NS = 2_000_000


@dataclass(frozen=True)
class Shift:
    """What to add to a rank's times; 0 and 0 on the first rank's host. `error_ns`: None if nothing binds the clocks."""

    by_ns: int = 0
    error_ns: int | None = 0

    @property
    def estimated(self) -> bool:
        return self.by_ns != 0 or self.error_ns != 0


HOME = Shift()


def limits(rows: Sequence[Mapping[str, Any]], loop_ns: int, leader: Sequence[Bar]) -> tuple[int, int] | None:
    """The least and the most that may be added to the mesh leader's times: no message arrived before it was sent.

    None where nothing went both ways.
    """
    heard = {bar.call_id: bar.t0_ns for bar in leader if bar.kind is Kind.generate}
    answered = {bar.call_id: bar.t0_ns for bar in leader if bar.kind is Kind.answer}
    least, most = [], []
    for row in rows:
        call_id, sent, arrived = row["call_id"], row.get("tSent_ms"), row.get("tArrived_ms")
        if isinstance(sent, float) and call_id in heard:
            least.append(loop_ns + round(sent * 1e6) - heard[call_id])
        if isinstance(arrived, float) and call_id in answered:
            most.append(loop_ns + round(arrived * 1e6) - answered[call_id])
    return (max(least), min(most)) if least and most else None


def across_link(rows: Sequence[Mapping[str, Any]], loop_ns: int, leader: Sequence[Bar]) -> Shift:
    """For the mesh leader's clock, from what Stage 0 sent and received when."""
    found = limits(rows, loop_ns, leader)
    if found is None:
        return Shift(0, None)
    low, high = found
    return Shift((low + high) // 2, abs(high - low) // 2)


def one_clock(rows: Sequence[Mapping[str, Any]], loop_ns: int, leader: Sequence[Bar]) -> bool:
    """Whether Stage 0's and the leader's times can be of one clock."""
    found = limits(rows, loop_ns, leader)
    return found is None or found[0] - SLACK_NS <= 0 <= found[1] + SLACK_NS


def across_mesh(first: Sequence[Bar], other: Sequence[Bar]) -> Shift:
    """For another mesh rank's clock, from when both left phase B of the same calls."""
    left = {bar.call_id: bar.t1_ns for bar in first if bar.kind is Kind.generate}
    gaps = [left[bar.call_id] - bar.t1_ns for bar in other if bar.kind is Kind.generate and bar.call_id in left]
    if not gaps:
        return Shift(0, None)
    return Shift(round(statistics.median(gaps)), (max(gaps) - min(gaps)) // 2)
