"""How much of two stages ran at the same time, from the times of each chunk alone (contract, section 11)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WARM_UP = 2  # the first chunks of a run have nothing to overlap with
GATE = 0.30


@dataclass(frozen=True)
class Overlap:
    """`score` is the median of hidden / min(stage0, stage1); the others are medians in milliseconds over `chunks`."""

    score: float
    stage0_ms: float
    stage1_ms: float
    period_ms: float
    mesh_idle_ms: float
    chunks: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def overlap(rows: Sequence[Mapping[str, Any]], warm_up: int = WARM_UP) -> Overlap | None:
    """The overlap of a run, from rank 0's chunk records; None with fewer than two chunks after the warm-up.

    stage0 = (tA1 - tA0) + (tEmit - tRecv), stage1 = t_b, period = tEmit[k] - tEmit[k-1],
    hidden = max(0, stage0 + stage1 - period). While chunk k is decoded, Stage 0 makes the next envelope: that time,
    `t_inside_ms`, lies within tEmit - tRecv of k and is counted with the chunk it was made for, not twice.
    """
    values = []
    for before, row in itertools.pairwise(rows[warm_up:]):
        stage0 = (row["tA1_ms"] - row["tA0_ms"]) + (row["tEmit_ms"] - row["tRecv_ms"] - row["t_inside_ms"])
        stage1, period = row["t_b_ms"], row["tEmit_ms"] - before["tEmit_ms"]
        hidden = max(0.0, stage0 + stage1 - period)
        values.append((hidden / max(min(stage0, stage1), 1e-9), stage0, stage1, period, row["t_mesh_idle_ms"]))
    if not values:
        return None
    score, stage0, stage1, period, idle = (statistics.median(column) for column in zip(*values, strict=True))
    return Overlap(score, stage0, stage1, period, idle, len(values))
