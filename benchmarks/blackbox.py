"""One event of the black box against one line of a structured log, and against its limit of 2 microseconds.

A *collective* is everything that `Group` adds for the box: the call site, the record, the live words, and the word
that says it came back. A *commitment* is one `commit`. The rival writes the same fields as one JSON line with
`logging.info` to a file, which is what one would do without a black box, and which loses its buffer or its order
when the process is killed unless it is flushed, as it is here.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Pairs, Row, in_turns

LIMIT_US = 2.0
EVENTS = 2000
IDS = {"call_id": 7, "chunk_index": 3, "cache_epoch": 0}


def run(quick: bool) -> list[Row]:
    """Each measurement is a burst of events; times are microseconds an event, the loop's own cost taken off."""
    from engine.blackbox import BlackBox, pack_signature
    from engine.comm.group import call_site

    with tempfile.TemporaryDirectory() as directory:
        box = BlackBox(Path(directory) / "box", 0)
        slot = box.open_group("mesh_pg", (0, 1))
        signature = pack_signature(1, "mesh_pg", "all_reduce", "float32[1,32,64]")
        log = logging.getLogger("benchmarks.blackbox")
        log.propagate = False
        log.setLevel(logging.INFO)
        handler = logging.FileHandler(Path(directory) / "log")
        log.addHandler(handler)

        def collective() -> None:
            box.enter(slot, signature, call_site(), IDS)
            box.leave()

        # `call_site` looks past the frames of `Group`: here they are, and the same without their content.
        def passed_on() -> None:
            collective()

        def as_in_a_group() -> None:
            passed_on()

        def nothing() -> None:
            pass

        def nothing_passed_on() -> None:
            nothing()

        def nothing_as_in_a_group() -> None:
            nothing_passed_on()

        def commitment() -> None:
            box.commit("enter B", "mesh_pg", IDS)

        def line() -> None:
            log.info(json.dumps({"t_ns": time.monotonic_ns(), "action": "enter B", "group": "mesh_pg", **IDS}))

        calls = {"collective": as_in_a_group, "nothing": nothing_as_in_a_group, "commitment": commitment, "line": line}
        times = in_turns(
            {name: lambda call=call: _burst(call) for name, call in calls.items()},  # type: ignore[misc]
            20 if quick else 100,
            warm_up=3,
        )
        log.removeHandler(handler)
        handler.close()
        box.close()
    return [
        _row("black box, a collective", times, "collective", note="call site, record, live words, and the way out"),
        _limit("black box, a collective: the limit", times, "collective"),
        _row("black box, a commitment point", times, "commitment"),
        _limit("black box, a commitment point: the limit", times, "commitment"),
    ]


def _burst(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(EVENTS):
        call()
    return (time.perf_counter() - started) / EVENTS


def _row(name: str, times: Pairs, ours: str, *, note: str = "") -> Row:
    ratios = times.ratios(ours, "line")
    return Row(
        name=name,
        ours=times.median(ours) * 1e6,
        rival_name="one JSON line by logging.info to a file",
        rival=times.median("line") * 1e6,
        unit="us",
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=0.5,
        samples=len(ratios),
        note=note,
    )


def _limit(name: str, times: Pairs, ours: str) -> Row:
    """Net of an empty call where the measurement wraps ours in calls of its own."""
    empty = times.times["nothing"] if ours == "collective" else [0.0] * len(times.times[ours])
    net = [(a - b) * 1e6 for a, b in zip(times.times[ours], empty, strict=True)]
    return Row(
        name=name,
        ours=statistics.median(net),
        rival_name="the limit",
        rival=LIMIT_US,
        unit="us",
        ratio=statistics.median(net) / LIMIT_US,
        low=min(net) / LIMIT_US,
        high=max(net) / LIMIT_US,
        target=1.0,
        samples=len(net),
    )
