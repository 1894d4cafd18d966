"""Steering a running job: one request to its socket, and what became of it."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Annotated, Any

import typer

from tpctl.exitcodes import ExitCode
from tpctl.jobs import place
from tpctl.jobs.hosts import require_rank_zero
from tpctl.jobs.line import Line
from tpctl.jobs.record import JobRecord
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

POLL_S = 0.05
DONE = ("shown", "held")
WORDS = {
    "received": "received, and not applied yet",
    "held": "applied: the stream waits before chunk {chunk_index}",
    "applied": "applied at chunk {chunk_index}, and not seen yet",
    "shown": "applied at chunk {chunk_index}, whose first frame is out",
}

TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.0, help="Seconds to wait for the first frame; 0: only until it is received.")
]
IdOption = Annotated[
    str | None, typer.Option("--id", help="The request's own id: said again with it, it does nothing twice.")
]


def steer(out: Output, name: str, change: dict[str, Any], request_id: str | None, timeout_s: float) -> None:
    """Ask for a change, follow it to its first frame, print the receipt and exit."""
    job, began, nap = place.find(name), time.monotonic(), threading.Event()
    require_rank_zero(JobRecord.read(job.record))
    own_id = request_id or uuid.uuid4().hex
    with Line(job) as line:
        answer = line.ask({"id": own_id, "op": "steer", **change})
        while answer["state"] not in DONE and time.monotonic() - began < timeout_s:
            nap.wait(POLL_S)
            answer = line.ask({"id": own_id, "op": "receipt"})
    good = answer["state"] in DONE or timeout_s == 0
    verdict = Verdict.PASS if good else Verdict.UNKNOWN
    words = f"{name}: " + WORDS[answer["state"]].format(**answer)
    step = f"tpctl status {name}"
    finding = Finding("job.steer", verdict, words, answer["state"], next=step)
    data = {
        "name": name,
        "id": own_id,
        "request": change,
        "state": answer["state"],
        "chunk_index": answer["chunk_index"],
        "waited_s": time.monotonic() - began,
    }
    out.emit(Envelope("tpctl.steer", verdict, data, (finding,), next=(step,), run_id=name), text=[words])
    raise typer.Exit(int(ExitCode.PASS if good else ExitCode.DEADLINE))
