"""A run as trace events (the Chrome trace event format, as JSON), which Perfetto opens. Pure.

One process a rank, one thread a lane; complete events (X) for bars, instant events (i) for commitment points, counter
events (C) for the queues, and flow events (s, t, f) along each call: from Stage 0's envelope to the mesh leader's phase
B to the decode, and from the leader's phase B to that of every other mesh rank. Times are microseconds since the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpctl.trace.bars import Bar, Kind, Lane
from tpctl.trace.run import RankLine, Run

LANES = tuple(Lane)
COMMITMENTS = len(LANES)  # the thread of the instant events
SENDS = (Kind.queued, Kind.envelope)
DECODES = (Kind.anchor, Kind.decode, Kind.rest)
UNITS = {"d_in": "envelopes", "d_out": "results"}


def trace(run: Run, title: str) -> dict[str, Any]:
    """The whole file, as plain data."""
    first_ns = min(
        [bar.t0_ns for bar in run.bars] + [one.t_ns for line in run.ranks for one in line.commitments], default=0
    )
    metadata = [event for line in run.ranks for event in _names(line)]
    events = [event for line in run.ranks for event in _of_rank(line)]
    events += [_counter(name, t_ns, depth) for name, steps in run.counters.items() for t_ns, depth in steps]
    events += _flows(run)
    for event in events:
        event["ts"] = (event["ts"] - first_ns) / 1e3
    events.sort(key=lambda event: event["ts"])  # stable: a slice comes before the flow that is bound to it
    return {
        "traceEvents": metadata + events,
        "displayTimeUnit": "ms",
        "otherData": {
            "title": title,
            "run_dir": str(run.run_dir),
            "tp_plan": run.tp_plan,
            "first_monotonic_ns": first_ns,
            "clocks": {
                str(line.rank): {"host": line.host, "shift_ns": line.shift.by_ns, "error_ns": line.shift.error_ns}
                for line in run.ranks
            },
        },
    }


def _names(line: RankLine) -> Iterator[dict[str, Any]]:
    about: list[tuple[str, int, dict[str, Any]]] = [
        ("process_name", 0, {"name": f"rank {line.rank} ({line.role})"}),
        ("process_sort_index", 0, {"sort_index": line.rank}),
    ]
    threads = {LANES.index(bar.lane): bar.lane.value for bar in line.bars}
    if line.commitments:
        threads[COMMITMENTS] = "commitment points"
    for tid, name in sorted(threads.items()):
        about += [("thread_name", tid, {"name": name}), ("thread_sort_index", tid, {"sort_index": tid})]
    for name, tid, args in about:
        yield {"ph": "M", "name": name, "pid": line.rank, "tid": tid, "args": args}


def _of_rank(line: RankLine) -> Iterator[dict[str, Any]]:
    for bar in line.bars:
        ids = {"call_id": bar.call_id, "chunk_index": bar.chunk_index, "cache_epoch": bar.cache_epoch}
        args: dict[str, Any] = {name: value for name, value in ids.items() if value >= 0}
        if bar.open:
            args["unfinished"] = True
        yield {
            "ph": "X",
            "name": label(bar),
            "cat": bar.lane.value,
            "pid": bar.rank,
            "tid": LANES.index(bar.lane),
            "ts": bar.t0_ns,
            "dur": (bar.t1_ns - bar.t0_ns) / 1e3,
            "args": args,
        }
    for one in line.commitments:
        yield {
            "ph": "i",
            "s": "t",
            "name": one.action,
            "cat": "commitment",
            "pid": line.rank,
            "tid": COMMITMENTS,
            "ts": one.t_ns,
            "args": {
                "seq": one.seq,
                "group": one.group,
                "call_id": one.call_id,
                "chunk_index": one.chunk_index,
                "cache_epoch": one.cache_epoch,
            },
        }


def label(bar: Bar) -> str:
    """What a slice is called: its kind and its chunk."""
    words = bar.name or bar.kind.value
    if bar.chunk_index >= 0:
        words += f" {bar.chunk_index}"
    return words + (" (unfinished)" if bar.open else "")


def _counter(name: str, t_ns: int, depth: int) -> dict[str, Any]:
    return {"ph": "C", "name": name, "cat": "queue", "pid": 0, "tid": 0, "ts": t_ns, "args": {UNITS[name]: depth}}


def _flows(run: Run) -> Iterator[dict[str, Any]]:
    """Each flow's ends lie inside the slices that they bind to, in the order in which they happened."""
    generated = [_by_call(line.bars, (Kind.generate,)) for line in run.ranks]
    leader = next((number for number, line in enumerate(run.ranks) if "stage1" in line.role and generated[number]), 0)
    if not run.ranks:
        return
    sent, decoded = _by_call(run.ranks[0].bars, SENDS), _by_call(run.ranks[0].bars, DECODES)
    for call_id, made in generated[leader].items():
        yield from _flow("call", call_id, [sent.get(call_id), made, decoded.get(call_id)])
        for number, others in enumerate(generated):
            if number != leader and call_id in others:
                yield from _flow("mesh", call_id * len(run.ranks) + number, [made, others[call_id]])


def _flow(name: str, id: int, stops: Sequence[Bar | None]) -> Iterator[dict[str, Any]]:
    found = [bar for bar in stops if bar is not None]
    points: list[tuple[Bar, int]] = []
    for bar in found:
        least = points[-1][1] if points else bar.t0_ns
        point = max(bar.t0_ns, least)
        if point >= bar.t1_ns:  # clocks of two hosts that do not quite agree: no arrow is better than one backwards
            continue
        points.append((bar, point))
    for number, (bar, point) in enumerate(points if len(points) > 1 else ()):
        ph = "s" if number == 0 else "f" if number == len(points) - 1 else "t"
        event = {"ph": ph, "name": name, "cat": "call", "id": id, "pid": bar.rank, "tid": LANES.index(bar.lane)}
        yield event | {"ts": point} | ({"bp": "e"} if ph == "f" else {})


def _by_call(bars: Sequence[Bar], kinds: Sequence[Kind]) -> dict[int, Bar]:
    """The first bar of each call that is of one of these kinds."""
    found: dict[int, Bar] = {}
    for bar in sorted(bars, key=lambda bar: bar.t0_ns):
        if bar.kind in kinds and bar.call_id >= 0:
            found.setdefault(bar.call_id, bar)
    return found


def counts(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many events there are of each kind, in words."""
    words = {"X": "slices", "i": "instants", "C": "counters", "s": "flows"}
    return {name: sum(event["ph"] == ph for event in events) for ph, name in words.items()}
