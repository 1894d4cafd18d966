"""What a rank did when, in bars: from its chunk records or, in pp on rank 0, its stage records. Pure.

Times are nanoseconds of the rank's own monotonic clock. A mesh rank's record tells when its turn ended and how long
each part of it took, in an order that its role fixes; Stage 0's tells when a chunk passed each stage of the pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Lane(StrEnum):
    """Threads of a rank, in the order in which they are shown."""

    state = "state"
    a = "phase A"
    link = "link"
    b = "phase B"
    c = "phase C"


class Kind(StrEnum):
    state = "state"
    prepare = "prepare"
    queued = "envelope waits for the mesh"
    envelope = "envelope"
    receive = "wait and receive"
    generate = "generate"
    answer = "answer"
    result = "result"
    anchor = "decode to the anchor"
    decode = "decode"
    rest = "decode the rest"


@dataclass(frozen=True)
class Bar:
    """One thing that took time. `open` if it had not ended when the rank was last heard of."""

    rank: int
    lane: Lane
    kind: Kind
    t0_ns: int
    t1_ns: int
    call_id: int = -1
    chunk_index: int = -1
    cache_epoch: int = -1
    name: str = ""
    open: bool = False

    def shifted(self, by_ns: int) -> Bar:
        return replace(self, t0_ns=self.t0_ns + by_ns, t1_ns=self.t1_ns + by_ns)


LEAST_NS = 10_000  # what took less than 10 microseconds was not done at all: a worker without codecs decodes nothing


def stage0_bars(rank: int, row: Mapping[str, Any], loop_ns: int) -> list[Bar] | None:
    """Phases A and C of one chunk of a pp plan; None for a record without their times."""
    names = ("tA0_ms", "tA1_ms", "tRecv_ms", "tFeed_ms", "tEmit_ms", "t_inside_ms", "latents_before_feed")
    times = _numbers(row, names)
    if times is None:
        return None
    tA0, tA1, tRecv, tFeed, tEmit = (loop_ns + round(times[name] * 1e6) for name in names[:5])
    fed = tFeed + round(times["t_inside_ms"] * 1e6)
    before = times["latents_before_feed"] > 0
    bars = [(Lane.a, Kind.prepare, tA0, tA1)]
    if before:
        bars.append((Lane.c, Kind.anchor, tRecv, tFeed))
    bars.append((Lane.c, Kind.rest if before else Kind.decode, fed, tEmit))
    return _made(rank, row, bars)


def mesh_bars(rank: int, row: Mapping[str, Any], role: str) -> list[Bar] | None:
    """One turn of a mesh rank, whichever it is; None for a record without its times."""
    times = _numbers(row, ("ended_ns", "period_ms", "tB0_ns", "t_b_ms", "t_c_ms", "t_frame_ms"))
    if times is None:
        return None
    spans = {name: round(times[name] * 1e6) for name in times if name.endswith("_ms")}
    t_a = _numbers(row, ("t_a_ms",))
    a_ns = round(t_a["t_a_ms"] * 1e6) if t_a else 0
    ended, began_b = int(times["ended_ns"]), int(times["tB0_ns"])
    began = ended - spans["period_ms"]
    framed = began + spans["t_frame_ms"]
    leads = rank == 0  # of a plan without pp: phase A first, then the frame goes out
    bars = []
    if leads:
        bars += [(Lane.a, Kind.prepare, began, began + a_ns), (Lane.link, Kind.envelope, began + a_ns, framed + a_ns)]
    else:
        bars += [(Lane.link, Kind.receive, began, framed), (Lane.a, Kind.prepare, framed, framed + a_ns)]
    bars.append((Lane.b, Kind.generate, began_b, began_b + spans["t_b_ms"]))
    if role == "stage1+leader":
        bars.append((Lane.link, Kind.answer, ended - spans["t_c_ms"], ended))
    else:
        bars.append((Lane.c, Kind.decode, ended - spans["t_c_ms"], ended))
    return _made(rank, row, bars)


def link_bars(
    stage0: Sequence[Bar], leader: Sequence[Bar], rows: Sequence[Mapping[str, Any]], loop_ns: int
) -> list[Bar]:
    """What was under way between Stage 0 and the mesh leader, drawn on Stage 0's link; all on one clock.

    An envelope waits from when it was posted until the leader asks for one, and then until the leader has it all. A
    result is under way from when the leader begins to answer until Stage 0 has it. Where two are under way at once,
    the earlier one's bar ends where the next one's begins: a lane shows one thing at a time.
    """
    asked = {bar.call_id: bar for bar in leader if bar.kind is Kind.receive}
    answered = {bar.call_id: bar.t0_ns for bar in leader if bar.kind is Kind.answer}
    rank = stage0[0].rank if stage0 else 0
    spans: list[Bar] = []
    for row in rows:
        call_id = row["call_id"]
        sent, arrived = (_moment(row, name, loop_ns) for name in ("tSent_ms", "tArrived_ms"))
        if sent is not None and call_id in asked:
            began, had = max(sent, asked[call_id].t0_ns), asked[call_id].t1_ns
            spans += _made(rank, row, [(Lane.link, Kind.queued, sent, began), (Lane.link, Kind.envelope, began, had)])
        if arrived is not None and call_id in answered:
            spans += _made(rank, row, [(Lane.link, Kind.result, answered[call_id], arrived)])
    return _apart(sorted(spans, key=lambda bar: bar.t0_ns))


def _apart(bars: Sequence[Bar]) -> list[Bar]:
    placed: list[Bar] = []
    for bar in bars:
        if placed and placed[-1].t1_ns > bar.t0_ns:
            placed[-1] = replace(placed[-1], t1_ns=bar.t0_ns)
        placed.append(bar)
    return [bar for bar in placed if bar.t1_ns > bar.t0_ns]


def _moment(row: Mapping[str, Any], name: str, loop_ns: int) -> int | None:
    found = _numbers(row, (name,))
    return None if found is None else loop_ns + round(found[name] * 1e6)


def _made(rank: int, row: Mapping[str, Any], bars: Sequence[tuple[Lane, Kind, int, int]]) -> list[Bar]:
    ids = row["call_id"], row["chunk_index"], row["cache_epoch"]
    return [Bar(rank, lane, kind, t0, t1, *ids) for lane, kind, t0, t1 in bars if t1 - t0 >= LEAST_NS]


def _numbers(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float] | None:
    found = {name: row.get(name) for name in names}
    good = {k: v for k, v in found.items() if type(v) in (int, float) and math.isfinite(v)}  # type: ignore[arg-type]
    return good if len(good) == len(names) else None  # type: ignore[return-value]


def depths(rows: Sequence[Mapping[str, Any]], loop_ns: int) -> dict[str, list[tuple[int, int]]]:
    """How `d_in` and `d_out` changed: (time, depth) each time. A chunk that was dropped left no times."""
    changes: dict[str, list[tuple[int, int]]] = {"d_in": [], "d_out": []}
    for row in rows:
        for queue, into, out in (("d_in", "tA1_ms", "tSent_ms"), ("d_out", "tArrived_ms", "tRecv_ms")):
            times = _numbers(row, (into, out))
            if times is not None:
                t0, t1 = (loop_ns + round(times[name] * 1e6) for name in (into, out))
                changes[queue] += [(t0, 1), (max(t0, t1), -1)]
    return {queue: list(_summed(sorted(steps))) for queue, steps in changes.items()}


def _summed(steps: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    depth = 0
    for t_ns, step in steps:
        depth += step
        yield t_ns, depth
