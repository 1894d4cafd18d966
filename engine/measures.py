"""How much of two stages ran at the same time, from the times of each chunk alone (contract, section 11).

Section 11 counts `tEmit - tRecv` as the chunk's own. But while chunk k is decoded, Stage 0 makes a later envelope: that
time (`t_inside_ms`) is `tA1 - tA0` there already. Counted in both, a pipeline that hides nothing would score phase A
over the shorter stage: `score_nested` is that figure, kept beside; `score`, which is gated, counts it once.

No period can be below `bound_ms`: Stage 0's own time, or the mesh's and, where the next envelope waits for an anchor
from pixels, what that costs after a result came: decoding up to the anchor, and encoding it anew (`t_anchor_ms`).
"""

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
    """Medians over `chunks` chunks: of hidden / min(stage0, stage1), and of times in milliseconds."""

    score: float
    score_nested: float
    stage0_ms: float
    stage1_ms: float
    hidden_ms: float
    period_ms: float
    mesh_idle_ms: float
    anchor_ms: float
    chunks: int

    @property
    def bound_ms(self) -> float:
        """max(stage0, stage1 + anchor): the shortest period that these stages allow."""
        return max(self.stage0_ms, self.stage1_ms + self.anchor_ms)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "bound_ms": self.bound_ms}


def stages(row: Mapping[str, Any], emitted_before_ms: float | None) -> dict[str, float | None]:
    """`stage0_ms`, `stage1_ms` and `hidden_ms` of one chunk; hidden is None where no chunk was emitted before it.

    stage0 = (tA1 - tA0) + (tEmit - tRecv) - t_inside, stage1 = t_b, period = tEmit[k] - tEmit[k-1],
    hidden = max(0, stage0 + stage1 - period).
    """
    stage0 = (row["tA1_ms"] - row["tA0_ms"]) + (row["tEmit_ms"] - row["tRecv_ms"]) - row["t_inside_ms"]
    stage1 = row["t_b_ms"]
    if emitted_before_ms is None:
        return {"stage0_ms": stage0, "stage1_ms": stage1, "hidden_ms": None}
    hidden = max(0.0, stage0 + stage1 - (row["tEmit_ms"] - emitted_before_ms))
    return {"stage0_ms": stage0, "stage1_ms": stage1, "hidden_ms": hidden}


def overlap(rows: Sequence[Mapping[str, Any]], warm_up: int = WARM_UP) -> Overlap | None:
    """The overlap of a run, from rank 0's chunk records; None without two chunks in a row after the warm-up."""
    values = []
    for before, row in itertools.pairwise(rows[warm_up:]):
        if row["chunk_index"] != before["chunk_index"] + 1:
            continue  # a cut dropped what lay between: the period is not one chunk's
        found = stages(row, before["tEmit_ms"])
        stage0, stage1, hidden = (float(found[key] or 0.0) for key in ("stage0_ms", "stage1_ms", "hidden_ms"))
        period = row["tEmit_ms"] - before["tEmit_ms"]
        nested0 = stage0 + row["t_inside_ms"]
        nested = max(0.0, nested0 + stage1 - period) / max(min(nested0, stage1), 1e-9)
        score = hidden / max(min(stage0, stage1), 1e-9)
        idle, anchor = row["t_mesh_idle_ms"], before["t_anchor_ms"]  # the anchor of this chunk, made with the last one
        values.append((score, nested, stage0, stage1, hidden, period, idle, anchor))
    if not values:
        return None
    score, nested, stage0, stage1, hidden, period, idle, anchor = (
        statistics.median(column) for column in zip(*values, strict=True)
    )
    return Overlap(score, nested, stage0, stage1, hidden, period, idle, anchor, len(values))
