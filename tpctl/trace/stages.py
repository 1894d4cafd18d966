"""Which stage of a chunk takes how long, and which of them the period is spent on. Pure.

Rank 0 sees all of them, whichever the plan: it makes the envelope, waits for the mesh, decodes, and hands over to the
sinks. A rank of the mesh that is slow shows as `generate` here, as on every other one: each collective waits for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.measures import WARM_UP

STAGES = ("prepare", "envelope", "generate", "decode", "sink")


@dataclass(frozen=True)
class Stages:
    """Medians in milliseconds over `chunks` chunks after the warm-up. `sink`: what the stream waited for its sinks."""

    times_ms: Mapping[str, float]
    period_ms: float
    chunks: int

    @property
    def slowest(self) -> str:
        return max(STAGES, key=lambda stage: self.times_ms[stage])

    def to_dict(self) -> dict[str, Any]:
        return {**self.times_ms, "period": self.period_ms, "chunks": self.chunks}


def stages(rows: Sequence[Mapping[str, Any]]) -> Stages | None:
    """Measure rank 0's chunk records, or its stage records; None where no chunk after the warm-up has its times."""
    found = [times for row in rows[WARM_UP:] if (times := _times(row)) is not None]
    if not found:
        return None
    median = {name: statistics.median(times[name] for times in found) for name in (*STAGES, "period")}
    return Stages({stage: median[stage] for stage in STAGES}, median["period"], len(found))


def _times(row: Mapping[str, Any]) -> dict[str, float] | None:
    names = {"prepare": "t_a_ms", "generate": "t_b_ms", "decode": "t_c_ms", "sink": "t_sink_ms", "period": "period_ms"}
    times = {stage: row.get(name) for stage, name in names.items()}
    times["envelope"] = row.get("t_frame_ms", 0.0)  # in pp its own thread sends
    if any(type(value) not in (int, float) for value in times.values()):
        return None
    given = {stage: float(value) for stage, value in times.items() if value is not None}
    return given | {"decode": max(0.0, given["decode"] - given["sink"])}  # phase C holds both
