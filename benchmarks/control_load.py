"""A thousand control requests a second for half a minute, and what that does to the stream they steer.

One tiny job of two ranks, Stage 0 on one of them. It rests, is under load, and rests again, so that a machine which
gets slower or faster meanwhile counts on both sides. Half of the requests change the bias, half ask what became of
one; each has its own id. A request is lost if it is not answered, is refused, or if what it changed was never seen:
after the load every receipt is asked for again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
RATE, LOAD_S, QUICK_S = 1000, 30.0, 5.0
TARGET = 1.2
BURST_S = 0.01  # as many as come due in this time are sent together
TINY = ("plan.tp_plan=pp0", "sink.kinds=null", "geometry.height=32", "geometry.width=32")
JOB = "load"
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Fired:
    """What became of the requests. Latencies in milliseconds, from a burst's sending to its last answer."""

    sent: int
    answered: int
    refused: int
    unseen: int
    took_s: float
    latency_p50_ms: float
    latency_p99_ms: float

    @property
    def lost(self) -> int:
        return self.sent - self.answered + self.refused + self.unseen


def fire(path: Path, rate: float, seconds: float) -> Fired:
    """Send `rate` requests a second over one connection, in bursts, then ask for the receipt of each change.

    Raises:
        OSError: the connection broke.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(path))
        answers = connection.makefile("rb")
        nap, began = threading.Event(), time.monotonic()
        sent = answered = refused = 0
        latencies = []
        while sent < rate * seconds:
            burst = []
            while sent < min(rate * seconds, rate * (time.monotonic() - began)):
                burst.append(_request(sent))
                sent += 1
            sent_at = time.monotonic()
            connection.sendall(b"".join(burst))
            for _ in burst:
                answer = json.loads(answers.readline())
                answered += 1
                refused += not answer["ok"]
            latencies.append((time.monotonic() - sent_at) * 1e3)
            nap.wait(max(0.0, BURST_S - (time.monotonic() - sent_at)))
        took_s = time.monotonic() - began
        unseen = _unseen(connection, answers, range(0, sent, 2))
    latencies.sort()
    p50, p99 = (latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99))
    return Fired(sent, answered, refused, unseen, took_s, p50, p99)


def _request(number: int) -> bytes:
    change = {"op": "receipt", "id": f"r{number - 1}"}
    if number % 2 == 0:
        change = {"op": "steer", "id": f"r{number}", "bias": 0.3 + number % 100 / 1000}  # type: ignore[dict-item]
    return json.dumps({"v": 1, **change}).encode() + b"\n"


def _unseen(connection: socket.socket, answers: Any, numbers: range) -> int:
    """How many of these were not seen in a frame at last. The newest may have to wait for their chunk."""
    nap, end = threading.Event(), time.monotonic() + DEADLINE_S
    waiting = [f"r{number}" for number in numbers]
    while waiting and time.monotonic() < end:
        still = []
        for name in waiting:
            connection.sendall(json.dumps({"v": 1, "op": "receipt", "id": name}).encode() + b"\n")
            answer = json.loads(answers.readline())
            if answer.get("state") != "shown":
                still.append(name)
        waiting = still
        nap.wait(0.05)
    return len(waiting)


@contextlib.contextmanager
def running(directory: Path, *sets: str) -> Iterator[Path]:
    """A tiny job in a state directory of its own; yields its directory. Drained at the end, aborted if need be."""
    tpctl(directory, "up", "--name", JOB, *(word for pair in (*TINY, *sets) for word in ("--set", pair)))
    job = directory / "jobs" / JOB
    try:
        tpctl(directory, "wait", JOB, "--for", "running", "--timeout", str(DEADLINE_S))
        yield job
        tpctl(directory, "drain", JOB)
    finally:
        tpctl(directory, "abort", JOB, "--yes", check=False)


def tpctl(directory: Path, *words: str, check: bool = True) -> dict[str, Any]:
    """Run a command, and return the data that it answers.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tpctl", *words, "-o", "json"],
        cwd=ROOT,
        env=os.environ | {"TPCTL_STATE_DIR": str(directory), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S * 2,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"tpctl {' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)["data"]
    return answer


def run(quick: bool) -> list[Row]:
    seconds = QUICK_S if quick else LOAD_S
    with tempfile.TemporaryDirectory(prefix="tpctl-") as name:
        with running(Path(name)) as job:
            _rest(job, 20)  # the first chunks have nothing to overlap with
            edges = [_emitted(job)]
            _sleep(seconds / 2)
            edges.append(_emitted(job))
            command = [sys.executable, "-m", "benchmarks.control_load", str(job / "control.sock"), str(seconds)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S * 3, check=True)
            edges.append(_emitted(job))
            _sleep(seconds / 2)
            edges.append(_emitted(job))
        report = json.loads((job / "attempts" / "0" / "ranks" / "rank0.json").read_text())
    fired = Fired(**json.loads(done.stdout))
    periods = {chunk["chunk_index"]: chunk["period_ms"] for chunk in report["chunks"]}
    loaded = _sorted(periods, range(edges[1] + 1, edges[2]))
    rest = _sorted(periods, [*range(edges[0] + 1, edges[1]), *range(edges[2] + 1, edges[3])])
    note = (
        f"{fired.sent} requests in {fired.took_s:.1f} s, {fired.lost} lost; answered in {fired.latency_p50_ms:.1f} ms, "
        f"p99 {fired.latency_p99_ms:.1f} ms; {len(loaded)} chunks under load, {len(rest)} at rest"
    )
    rows = [
        Row(
            name=f"{RATE} control requests a second: chunk period p{percent}",
            ours=_percentile(loaded, percent),
            rival_name="the same job at rest",
            rival=_percentile(rest, percent),
            unit="ms",
            ratio=_percentile(loaded, percent) / _percentile(rest, percent),
            target=TARGET if percent == 99 else None,
            samples=len(loaded),
            note=note if percent == 99 else "",
        )
        for percent in (50, 99)
    ]
    lost = Row("control requests lost", fired.lost, "sent", fired.sent, "", fired.lost / fired.sent, target=0.0)
    return [*rows, lost]


def _emitted(job: Path) -> int:
    from engine.blackbox import Box

    with Box(job / "attempts" / "0" / "ranks" / "rank0.blackbox") as box:
        return box.stream().emitted


def _rest(job: Path, chunks: int) -> None:
    end = time.monotonic() + DEADLINE_S
    while _emitted(job) < chunks:
        if time.monotonic() > end:
            raise RuntimeError(f"the job made no {chunks} chunks in {DEADLINE_S:g} s")
        _sleep(0.1)


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


def _sorted(periods: dict[int, float], indices: Any) -> list[float]:
    return sorted(periods[index] for index in indices if index in periods)


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control_load", description="The load alone.")
    parser.add_argument("socket", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rate", type=float, default=RATE)
    options = parser.parse_args(arguments)
    print(json.dumps(asdict(fire(options.socket, options.rate, options.seconds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
