"""What an operator says to a running job: a unix socket of rank 0, and the requests that wait for their chunk.

One request a line, one answer a line, both JSON of this version:
    {"v": 1, "id": "...", "op": "steer", "prompt": "...", "cut": true, "bias": 0.5, "recompute": false, "paused": true}
    {"v": 1, "id": "...", "op": "receipt"}                        # what became of the request of that id
    {"v": 1, "id": "...", "op": "take-back"}                      # of a drain: the stream goes on, if it still can
    {"v": 1, "id": "...", "op": "metrics"}                        # answered with their text
    {"v": 1, "id": "...", "ok": true, "state": "received" | "held" | "applied" | "shown", "chunk_index": 7}
    {"v": 1, "id": "...", "ok": false, "code": "TP-6503", "message": "..."}

A request never touches a process group: it waits until Stage 0 makes its next chunk. A repeated id is answered with
what became of the first, and does nothing. A stream is paused before a chunk, which then waits: `held`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.timeline import Event, Timeline

VERSION = 1
MAX_LINE_BYTES = 64 * 1024
MAX_UNREAD_BYTES = 256 * 1024  # of answers that a client does not take
MAX_CLIENTS = 32
MAX_WAITING = 2048  # between two chunks, which a large model makes once in a second or two
REMEMBERED = 32_768  # at a thousand requests a second half a minute of them
MAX_PROMPT = 4096
MAX_DEPTH = 8  # of a request; more is never needed, and the parser recurses
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STEERS = ("prompt", "cut", "bias", "recompute", "paused")
OPS = ("steer", "receipt", "take-back", "metrics")
NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
NOT_ASKED = "no drain is under way"  # why nothing can be taken back, as yet
CREDENTIALS = struct.Struct("3i")


class ControlError(EngineError):
    """A request that is refused; the stream goes on."""

    code = "TP-6501"
    next_step = "tpctl set --help"


@dataclass(slots=True)
class Request:
    """One accepted request. `state` is received, held, applied, shown or taken back; its event is forgotten once it
    was applied."""

    event: Event | None = None
    state: str = "received"
    chunk_index: int | None = None
    text: str | None = None
    name: str = ""


@dataclass
class Steering:
    """Requests between the socket's thread, which adds them, and Stage 0's loop, which takes them.

    `take_back` ends a drain, or says why not; `metrics` tells their text. Both are called in the socket's thread.
    `counts` has every answer, by what was asked and how it went.
    """

    can_recompute: bool = True
    take_back: Callable[[], str | None] = lambda: "nothing drains here"
    metrics: Callable[[], str] = lambda: ""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    on_applied: Callable[[str, list[str], int], None] | None = None  # hears of each request as Stage 0 takes it
    _paused: bool = False
    _pauses: list[Request] = field(default_factory=list)  # and the end of pauses: what waits for `holds`
    _known: OrderedDict[str, Request] = field(default_factory=OrderedDict)
    _waiting: list[Request] = field(default_factory=list)
    _applied: list[Request] = field(default_factory=list)
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to one line; never raises for what a client wrote."""
        name: str | None = None
        op = "other"
        try:
            data = parse(line)
            op = data["op"] if data.get("op") in OPS else op
            if isinstance(data.get("id"), str) and ID.fullmatch(data["id"]):
                name = data["id"]
            request = self._handle(data)
        except ControlError as error:
            self.counts[op, "refused"] += 1
            return refusal(error.code, error.message, name)
        self.counts[op, "accepted"] += 1
        answer = {"v": VERSION, "id": name, "ok": True, "state": request.state, "chunk_index": request.chunk_index}
        return answer if request.text is None else {**answer, "text": request.text}

    def holds(self, chunk_index: int) -> bool:
        """Whether the stream is paused before this chunk. Asked by Stage 0's loop before it makes one."""
        with self._lock:
            for request in self._pauses:
                request.state, request.chunk_index = "held" if self._paused else "applied", chunk_index
            self._applied += [] if self._paused else self._pauses
            self._pauses = []
            return self._paused

    def wait(self, timeout_s: float) -> None:
        """Until the pause may be over, for no longer than this."""
        with self._lock:
            if self._paused:
                self._lock.wait(timeout_s)

    def wake(self) -> None:
        """End a `wait` now."""
        with self._lock:
            self._lock.notify_all()

    def take(self, chunk_index: int, planned: Event) -> Event:
        """Everything that waits, on top of what the timeline has for this chunk. Called once a chunk, in order."""
        with self._lock:
            taken, self._waiting = self._waiting, []
            told = [(request.name, _changes(request.event)) for request in taken]
            event = planned
            for request in taken:
                event = event if request.event is None else _over(event, request.event)
                request.event, request.state, request.chunk_index = None, "applied", chunk_index
            self._applied += taken
        if self.on_applied is not None:
            for name, changes in told:
                self.on_applied(name, changes, chunk_index)
        return event

    def shown(self, chunk_index: int) -> None:
        """A chunk was emitted: what was applied to it, or to a chunk dropped before it, can be seen now."""
        with self._lock:
            for request in self._applied:
                if request.chunk_index is not None and request.chunk_index <= chunk_index:
                    request.state = "shown"
            self._applied = [request for request in self._applied if request.state != "shown"]

    def _handle(self, data: Mapping[str, Any]) -> Request:
        version = data.get("v")
        if type(version) is not int or version < 1:
            raise ControlError(f"v must be {VERSION}, is {_short(version)}", code="TP-6502")
        if version > VERSION:
            raise ControlError(
                f"the request has version {_short(version)}, and this job knows {VERSION}", code="TP-6502"
            )
        name = data.get("id")
        if not isinstance(name, str) or not ID.fullmatch(name):
            raise ControlError("id must be 1 to 64 letters, digits, dots, dashes and underscores", code="TP-6503")
        if data.get("op") == "receipt":
            _only(data, ("v", "id", "op"))
            with self._lock:
                known = self._known.get(name)
            if known is None:
                raise ControlError(f"no request has the id {name}, or it is long ago", code="TP-6504")
            return known
        if data.get("op") == "metrics":
            _only(data, ("v", "id", "op"))
            return Request(state="told", text=self.metrics())
        if data.get("op") == "take-back":
            _only(data, ("v", "id", "op"))
            return self._take_back(name)
        if data.get("op") != "steer":
            raise ControlError(f"op must be one of {', '.join(OPS)}, is {_short(data.get('op'))}", code="TP-6503")
        _only(data, ("v", "id", "op", *STEERS))
        return self._accept(name, self._event(data), data.get("paused"))

    def _accept(self, name: str, event: Event, paused: bool | None) -> Request:
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                return known
            if len(self._waiting) + len(self._pauses) >= MAX_WAITING:
                raise ControlError(f"{MAX_WAITING} requests wait for the next chunk already", code="TP-6505")
            request = Request(event, name=name)
            self._remember(name, request)
            if paused is not None:
                self._paused = paused
                self._lock.notify_all()
            if event != Event(0):
                self._waiting.append(request)
            if paused or event == Event(0):
                self._pauses.append(request)
            return request

    def _take_back(self, name: str) -> Request:
        with self._lock:
            known = self._known.get(name)
        if known is not None:
            return known
        refused = self.take_back()
        if refused is not None:
            raise ControlError(refused, code="TP-7850")
        with self._lock:
            return self._remember(name, Request(state="taken back"))

    def _remember(self, name: str, request: Request) -> Request:
        self._known[name] = request
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return request

    def _event(self, data: Mapping[str, Any]) -> Event:
        said = {key: data[key] for key in STEERS if key in data}
        if not said or said == {"cut": False}:
            raise ControlError(f"nothing to change: give any of {', '.join(STEERS)}", code="TP-6503")
        prompt, bias = said.get("prompt"), said.get("bias")
        if "prompt" in said and (not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT):
            raise ControlError(f"prompt must be text of 1 to {MAX_PROMPT} characters", code="TP-6503")
        if isinstance(prompt, str) and any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt):
            raise ControlError("prompt has half a surrogate pair, which is no text", code="TP-6503")
        if "bias" in said and (isinstance(bias, bool) or not isinstance(bias, int | float) or not 0 < bias <= 1):
            raise ControlError(f"bias must be in (0, 1], is {_short(bias)}", code="TP-6503")
        for key in ("cut", "recompute", "paused"):
            if key in said and not isinstance(said[key], bool):
                raise ControlError(f"{key} must be true or false, is {_short(said[key])}", code="TP-6503")
        if said.get("recompute") and not self.can_recompute:
            raise ControlError("the window of this job is too short for a recompute", code="TP-6506")
        return Event(
            0, prompt, said.get("cut", False), float(bias) if bias is not None else None, said.get("recompute")
        )


def parse(line: bytes) -> dict[str, Any]:
    """One JSON object. Raises ControlError."""
    depth = deepest = 0
    for byte in line.translate(None, NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ControlError(f"the request nests deeper than {MAX_DEPTH}", code="TP-6503")
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ControlError("the request is no JSON in UTF-8", code="TP-6503") from error
    if not isinstance(data, dict):
        raise ControlError("the request is no JSON object", code="TP-6503")
    return data


def refusal(code: str, message: str, name: str | None = None) -> dict[str, Any]:
    """The answer to a request that is refused."""
    return {"v": VERSION, "id": name, "ok": False, "code": code, "message": message}


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _only(data: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    unknown = sorted(set(data) - set(keys))
    if unknown:
        raise ControlError(f"unknown key {_short(unknown[0])}", code="TP-6503")


def _changes(event: Event | None) -> list[str]:
    """The keys that a request changes."""
    if event is None:
        return []
    given = {"prompt": event.prompt, "cut": event.cut or None, "bias": event.bias, "recompute": event.recompute}
    return [key for key, value in given.items() if value is not None]


def _short(value: Any) -> str:
    return repr(value)[:40].encode("ascii", "backslashreplace").decode()


def _over(below: Event, above: Event) -> Event:
    return Event(
        below.at_chunk,
        above.prompt if above.prompt is not None else below.prompt,
        below.cut or above.cut,
        above.bias if above.bias is not None else below.bias,
        above.recompute if above.recompute is not None else below.recompute,
    )


def peer_uid(connected: socket.socket) -> int:
    """The user at the other end of a unix socket, as the kernel knows it."""
    _, uid, _ = CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)


class SteeredTimeline(Timeline):
    """A timeline on which requests come in: the event of a chunk is fixed when it is asked for first."""

    def __init__(self, planned: Timeline, steering: Steering) -> None:
        super().__init__(planned.events)
        object.__setattr__(self, "_steering", steering)
        object.__setattr__(self, "_fixed", (-1, Event(0)))

    _steering: Steering
    _fixed: tuple[int, Event]

    def at(self, chunk_index: int) -> Event | None:
        if self._fixed[0] != chunk_index:
            planned = super().at(chunk_index) or Event(chunk_index)
            object.__setattr__(self, "_fixed", (chunk_index, self._steering.take(chunk_index, planned)))
        return self._fixed[1]


class ControlSocket:
    """Listens at a path, for this user alone, in a thread of its own. Close it before the process ends.

    Raises:
        ControlError: the path cannot be bound.
    """

    def __init__(self, path: Path, steering: Steering) -> None:
        self._path = path
        self._steering = steering
        self._selector = selectors.DefaultSelector()
        self._in: dict[socket.socket, bytearray] = {}
        self._out: dict[socket.socket, bytearray] = {}
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path.unlink(missing_ok=True)  # of an earlier attempt: the job's lock says that no other is alive
            self._server.bind(str(path))
            path.chmod(0o600)
            self._server.listen(MAX_CLIENTS)
        except OSError as error:
            self._server.close()
            raise ControlError(f"cannot listen at {path}: {error}", code="TP-6507") from error
        self._stop_reader, self._stop_writer = os.pipe()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(self._stop_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop_writer, b".")
        self._thread.join(5.0)
        self._selector.close()
        os.close(self._stop_reader)
        os.close(self._stop_writer)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            for key, events in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                elif key.fd == self._stop_reader:
                    for client in list(self._in):
                        self._drop(client)
                    self._server.close()
                    return
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._talk(key.fileobj, events)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            uid = peer_uid(client)
            client.setblocking(False)
            if uid != os.geteuid() or len(self._in) >= MAX_CLIENTS:
                answer = (
                    refusal("TP-7852", f"user {uid} has no say here")
                    if uid != os.geteuid()
                    else refusal("TP-7853", f"{MAX_CLIENTS} connections are open already")
                )
                with client:
                    client.send(json.dumps(answer).encode() + b"\n")
                return
            self._in[client], self._out[client] = bytearray(), bytearray()
            self._selector.register(client, selectors.EVENT_READ)

    def _talk(self, client: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                received = client.recv(MAX_LINE_BYTES)
                if not received:
                    self._drop(client)
                    return
                self._read(client, received)
            if self._out.get(client):
                sent = client.send(self._out[client])
                del self._out[client][:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client in self._out:
            more = selectors.EVENT_WRITE if self._out[client] else 0
            self._selector.modify(client, selectors.EVENT_READ | more)

    def _read(self, client: socket.socket, received: bytes) -> None:
        pending, answers = self._in[client], self._out[client]
        pending += received
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            answers += json.dumps(self._answer(line)).encode() + b"\n"
        if len(pending) > MAX_LINE_BYTES:
            answers += json.dumps(self._answer(bytes(pending))).encode() + b"\n"
            with contextlib.suppress(OSError):
                client.send(answers)
            self._drop(client)  # where its next request begins nobody can tell
        elif len(answers) > MAX_UNREAD_BYTES:
            self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any]:
        if len(line) > MAX_LINE_BYTES:
            return refusal("TP-6508", f"a request may have {MAX_LINE_BYTES} bytes at most")
        return self._steering.answer(line)

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._in[client], self._out[client]
        client.close()
