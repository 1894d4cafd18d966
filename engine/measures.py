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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WARM_UP = 2  # the first chunks of a run have nothing to overlap with
GATE = 0.30
# Of the signature of a send after decode: what counts as tracking, and as mostly empty; the shortest decode, of a
# period, and the fewest chunks that can show it.
TRACKS = 0.8
EMPTY = 0.8
LEAST_DECODE = 0.1
LEAST_CHUNKS = 2
# Of a straggler: how much of phase B the others wait for it, in how many of the chunks, and of how many at least.
STRAGGLES = 0.2
MOSTLY = 0.8
LEAST_COMPARED = 4


@dataclass(frozen=True)
class Overlap:
    """Medians over `chunks` chunks: of hidden / min(stage0, stage1), and of times in milliseconds.

    `latency_ms` is a chunk's way from the start of its phase A until it is out.
    """

    score: float
    score_nested: float
    stage0_ms: float
    stage1_ms: float
    hidden_ms: float
    period_ms: float
    mesh_idle_ms: float
    anchor_ms: float
    latency_ms: float
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
    for before, row in _in_a_row(rows[warm_up:]):
        found = stages(row, before["tEmit_ms"])
        stage0, stage1, hidden = (float(found[key] or 0.0) for key in ("stage0_ms", "stage1_ms", "hidden_ms"))
        period = row["tEmit_ms"] - before["tEmit_ms"]
        nested0 = stage0 + row["t_inside_ms"]
        nested = max(0.0, nested0 + stage1 - period) / max(min(nested0, stage1), 1e-9)
        score = hidden / max(min(stage0, stage1), 1e-9)
        idle, anchor = row["t_mesh_idle_ms"], before["t_anchor_ms"]  # the anchor of this chunk, made with the last one
        latency = row["tEmit_ms"] - row["tA0_ms"]
        values.append((score, nested, stage0, stage1, hidden, period, idle, anchor, latency))
    if not values:
        return None
    score, nested, stage0, stage1, hidden, period, idle, anchor, latency = (
        statistics.median(column) for column in zip(*values, strict=True)
    )
    return Overlap(score, nested, stage0, stage1, hidden, period, idle, anchor, latency, len(values))


@dataclass(frozen=True)
class SendAfterDecode:
    """The signature of an envelope that is held back until the chunk before it is decoded, over `chunks` chunks.

    The mesh's wait tracks the decode (`tracks` is the median of one over the other), beyond what the anchor explains,
    and both queues are empty whenever a chunk is out (`empty`, of all chunks). Times are medians in milliseconds.
    """

    tracks: float
    empty: float
    idle_ms: float
    decode_ms: float
    chunks: int

    @property
    def found(self) -> bool:
        return self.tracks >= TRACKS and self.empty >= EMPTY

    def sentence(self) -> str:
        return (
            f"the mesh waits {self.idle_ms:.0f} ms a chunk for {self.decode_ms:.0f} ms of decode, and both queues are "
            f"empty after {self.empty:.0%} of {self.chunks} chunks"
        )


def send_after_decode(rows: Sequence[Mapping[str, Any]], warm_up: int = WARM_UP) -> SendAfterDecode | None:
    """Measure the signature in rank 0's chunk records.

    None where it could not show: too few chunks in a row after the warm-up, or a decode that the anchor needs all of
    (R0a, decode-all-first) or that is too short beside the period to tell its wait from any other. A chunk that begins
    a stream is left out: a hard cut may wait for all before it.
    """
    values = []
    for before, row in _in_a_row(rows[warm_up:]):
        if row["init_cache"]:
            continue
        anchor = before["t_anchor_ms"]
        decode = before["tEmit_ms"] - before["tRecv_ms"] - before["t_inside_ms"] - anchor
        if decode >= LEAST_DECODE * (row["tEmit_ms"] - before["tEmit_ms"]):
            idle = max(0.0, row["t_mesh_idle_ms"] - anchor)
            values.append((idle / decode, float(before["d_in"] + before["d_out"] == 0), idle, decode))
    if len(values) < LEAST_CHUNKS:
        return None
    tracks, empty, idle, decode = zip(*values, strict=True)
    return SendAfterDecode(
        statistics.median(tracks),
        statistics.mean(empty),
        statistics.median(idle),
        statistics.median(decode),
        len(values),
    )


@dataclass(frozen=True)
class Straggler:
    """The rank that all others wait for: in lockstep it is who waits least. `waits_ms` is how much less than the next
    rank, and `share` that of phase B; medians over `chunks` chunks."""

    rank: int
    waits_ms: float
    share: float
    chunks: int

    def sentence(self) -> str:
        return (
            f"rank {self.rank} is slow: every other rank waits {self.waits_ms:.0f} ms a chunk for it, {self.share:.0%} "
            f"of phase B ({self.chunks} chunks)"
        )


def straggler(rows: Mapping[int, Sequence[Mapping[str, Any]]], warm_up: int = WARM_UP) -> Straggler | None:
    """From the chunk records of all mesh ranks. None where no single rank holds the others up, or nothing tells."""
    by_call = {rank: {row["call_id"]: row for row in of_rank} for rank, of_rank in rows.items()}
    calls = sorted(set.intersection(*(set(of_rank) for of_rank in by_call.values())))[warm_up:] if by_call else []
    slowest: list[int] = []
    values: list[tuple[float, float]] = []
    for call in calls:
        waits = sorted((float(row[call]["t_wait_ms"]), rank) for rank, row in by_call.items() if _waited(row[call]))
        if len(waits) != len(by_call) or len(waits) < 2:
            continue
        (least, rank), (second, _) = waits[:2]
        slowest.append(rank)
        values.append((second - least, (second - least) / by_call[rank][call]["t_b_ms"]))
    if len(values) < LEAST_COMPARED:
        return None
    usual = statistics.mode(slowest)
    gap, share = (statistics.median(column) for column in zip(*values, strict=True))
    if share < STRAGGLES or slowest.count(usual) < MOSTLY * len(slowest):
        return None
    return Straggler(usual, gap, share, len(values))


def _waited(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("t_wait_ms"), float) and isinstance(row.get("t_b_ms"), float) and row["t_b_ms"] > 0


def _in_a_row(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each chunk with the one before it; where a cut dropped what lay between, the period is not one chunk's."""
    return ((a, b) for a, b in itertools.pairwise(rows) if b["chunk_index"] == a["chunk_index"] + 1)
