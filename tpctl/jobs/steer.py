"""Steering a running job: one request to its socket, and what became of it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import Annotated, Any

import typer

from engine.control import MAX_LINE_BYTES, VERSION, peer_uid
from tpctl.errors import NoJobError, RefusedError
from tpctl.exitcodes import ExitCode
from tpctl.jobs import place
from tpctl.jobs.place import JobDir
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

ANSWER_S = 5.0
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


class Line:
    """A connection to a job: to a process of this very user.

    Raises:
        NoJobError: nobody listens, or no answer came in time.
        RefusedError: the job refused the request.
    """

    def __init__(self, job: JobDir, timeout_s: float = ANSWER_S) -> None:
        self._job = job
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._pending = b""
        try:
            self._socket.connect(str(job.socket))
        except OSError as error:
            self._socket.close()
            raise self._silent(f"does not listen: {error.strerror}") from error
        uid = peer_uid(self._socket)
        if uid != os.geteuid():
            self._socket.close()
            raise RefusedError(
                f"the control socket of job '{job.name}' is user {uid}'s, not yours",
                code="TP-7854",
                evidence={"uid": os.geteuid()},
                next_step=f"ls -l {job.socket}",
            )

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, its answer."""
        try:
            self._socket.sendall(json.dumps({"v": VERSION, **request}).encode() + b"\n")
            while b"\n" not in self._pending:
                received = self._socket.recv(MAX_LINE_BYTES)
                if not received:
                    raise self._silent("closed the connection without an answer")
                self._pending += received
        except OSError as error:
            raise self._silent(f"did not answer: {error}") from error
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise RefusedError(
                f"job '{self._job.name}' refused the request: {answer['message']}",
                evidence={"refusal": answer["code"]},
                next_step=f"tpctl status {self._job.name}",
            )
        return answer

    def _silent(self, what: str) -> NoJobError:
        name = self._job.name
        return NoJobError(f"job '{name}' {what}", code="TP-7602", next_step=f"tpctl status {name}")


def steer(out: Output, name: str, change: dict[str, Any], request_id: str | None, timeout_s: float) -> None:
    """Ask for a change, follow it to its first frame, print the receipt and exit."""
    job, began, nap = place.find(name), time.monotonic(), threading.Event()
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
