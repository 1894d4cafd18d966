"""The rules of the Chrome trace event format that a viewer relies on, held against a whole trace."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

PHASES = {"M", "X", "B", "E", "i", "C", "s", "t", "f"}
METADATA = {"process_name": str, "process_sort_index": int, "thread_name": str, "thread_sort_index": int}


def problems(trace: dict[str, Any]) -> list[str]:
    """What is wrong, one sentence each; empty for a trace that opens."""
    events = trace.get("traceEvents")
    if not isinstance(events, list) or not events:
        return ["no traceEvents"]
    wrong = [f"event {number}: {what}" for number, event in enumerate(events) for what in _of_one(event)]
    if wrong:
        return wrong
    return _threads(events) + _flows(events)


def _of_one(event: dict[str, Any]) -> list[str]:
    wrong = []
    if event.get("ph") not in PHASES:
        return [f"ph is {event.get('ph')!r}"]
    if not isinstance(event.get("name"), str) or not event["name"]:
        wrong.append("no name")
    wrong += [f"{key} is {event.get(key)!r}" for key in ("pid", "tid") if type(event.get(key)) is not int]
    args = event.get("args", {})
    if event["ph"] == "M":
        key = {str: "name", int: "sort_index"}.get(METADATA.get(event.get("name", ""), object), "?")
        return wrong + ([] if key in args else [f"metadata without {key}"])
    if not _time(event.get("ts")):
        wrong.append(f"ts is {event.get('ts')!r}")
    if event["ph"] == "X" and not _time(event.get("dur")):
        wrong.append(f"dur is {event.get('dur')!r}")
    if event["ph"] == "i" and event.get("s") not in ("g", "p", "t"):
        wrong.append(f"scope is {event.get('s')!r}")
    if event["ph"] == "C" and not (args and all(type(value) in (int, float) for value in args.values())):
        wrong.append(f"a counter of {args!r}")
    if event["ph"] in "stf" and (type(event.get("id")) is not int or not event.get("cat")):
        wrong.append("a flow without id or category")
    return wrong


def _time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _threads(events: list[dict[str, Any]]) -> list[str]:
    """On each thread time never runs backwards, slices nest, and what begins ends."""
    wrong = []
    last: dict[tuple[int, int], float] = defaultdict(float)
    open_: dict[tuple[int, int], list[float]] = defaultdict(list)
    begun: dict[tuple[int, int], list[str]] = defaultdict(list)
    for event in (event for event in events if event["ph"] != "M"):
        thread, ts = (event["pid"], event["tid"]), event["ts"]
        if ts < last[thread]:
            wrong.append(f"{event['name']} at {ts} comes after {last[thread]} on thread {thread}")
        last[thread] = max(last[thread], ts)
        if event["ph"] == "X":
            while open_[thread] and open_[thread][-1] <= ts + 1e-3:
                open_[thread].pop()
            if open_[thread] and ts + event["dur"] > open_[thread][-1] + 1e-3:
                wrong.append(f"{event['name']} at {ts} reaches out of the slice around it on thread {thread}")
            open_[thread].append(ts + event["dur"])
        elif event["ph"] == "B":
            begun[thread].append(event["name"])
        elif event["ph"] == "E" and (not begun[thread] or begun[thread].pop() != event["name"]):
            wrong.append(f"{event['name']} ends on thread {thread} without a beginning")
    return wrong + [f"{name} never ends on thread {thread}" for thread, names in begun.items() for name in names]


def _flows(events: list[dict[str, Any]]) -> list[str]:
    """Each flow begins once and ends once, in order, and every point of it lies in a slice of its thread."""
    wrong = []
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    flows: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for event in (event for event in events if event["ph"] in "stf"):
        flows[event["cat"], event["name"], event["id"]].append(event)
        around = slices[event["pid"], event["tid"]]
        if not any(t0 <= event["ts"] < t1 for t0, t1 in around):
            wrong.append(f"flow {event['name']} {event['id']} at {event['ts']} is bound to no slice")
    for (_, name, id), points in flows.items():
        order = "".join(point["ph"] for point in points)
        if order.replace("t", "") != "sf" or order[0] != "s" or order[-1] != "f":
            wrong.append(f"flow {name} {id} goes {order}")
    return wrong
