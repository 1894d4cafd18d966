"""A line to a running job: one request, one answer, over its control socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

from engine.control import MAX_LINE_BYTES, VERSION, peer_uid
from tpctl.errors import NoJobError, RefusedError
from tpctl.jobs.place import JobDir

ANSWER_S = 5.0


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
            with contextlib.suppress(BrokenPipeError):  # whoever closed at once has said why
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
