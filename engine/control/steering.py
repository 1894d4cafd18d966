"""The requests that wait for their chunk: added by the socket's thread, taken by Stage 0's loop."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.control.request import ID, OPS, STEERS, VERSION, ControlError, event_of, only, parse, refusal, short
from engine.timeline import Event, Timeline

MAX_WAITING = 2048  # between two chunks, which a large model makes once in a second or two
REMEMBERED = 32_768  # at a thousand requests a second half a minute of them
NOT_ASKED = "no drain is under way"  # why nothing can be taken back, as yet


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
            raise ControlError(f"v must be {VERSION}, is {short(version)}", code="TP-6502")
        if version > VERSION:
            raise ControlError(
                f"the request has version {short(version)}, and this job knows {VERSION}", code="TP-6502"
            )
        name = data.get("id")
        if not isinstance(name, str) or not ID.fullmatch(name):
            raise ControlError("id must be 1 to 64 letters, digits, dots, dashes and underscores", code="TP-6503")
        if data.get("op") == "receipt":
            only(data, ("v", "id", "op"))
            with self._lock:
                known = self._known.get(name)
            if known is None:
                raise ControlError(f"no request has the id {name}, or it is long ago", code="TP-6504")
            return known
        if data.get("op") == "metrics":
            only(data, ("v", "id", "op"))
            return Request(state="told", text=self.metrics())
        if data.get("op") == "take-back":
            only(data, ("v", "id", "op"))
            return self._take_back(name)
        if data.get("op") != "steer":
            raise ControlError(f"op must be one of {', '.join(OPS)}, is {short(data.get('op'))}", code="TP-6503")
        only(data, ("v", "id", "op", *STEERS))
        return self._accept(name, event_of(data, self.can_recompute), data.get("paused"))

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


def _changes(event: Event | None) -> list[str]:
    """The keys that a request changes."""
    if event is None:
        return []
    given = {"prompt": event.prompt, "cut": event.cut or None, "bias": event.bias, "recompute": event.recompute}
    return [key for key, value in given.items() if value is not None]


def _over(below: Event, above: Event) -> Event:
    return Event(
        below.at_chunk,
        above.prompt if above.prompt is not None else below.prompt,
        below.cut or above.cut,
        above.bias if above.bias is not None else below.bias,
        above.recompute if above.recompute is not None else below.recompute,
    )


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
