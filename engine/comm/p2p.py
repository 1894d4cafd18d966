"""The pp link: the same frames as everywhere, passed between Stage 0 and the mesh leader over `pp_pg`.

A frame is a first message of fixed size (header, and the meta that fits), a second for a longer meta, and one for the
payload. Stage 0's end only ever posts, and reads what has arrived: it waits for nobody. The leader's end waits: for an
envelope, and until its answer is taken; room for the answer is posted before an envelope goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.blackbox import BlackBox
from engine.comm.pair import Pair, Posted
from engine.comm.transport import INLINE_BYTES, Received
from engine.errors import PreflightError
from engine.wire.dialect import PP, Dialect
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import (
    PayloadBuffer,
    PreparedFrame,
    check_result,
    check_specs,
    parse_meta,
    prepare,
    prepare_result,
    rebuild,
    rebuild_result,
)
from engine.wire.header import (
    HEADER_BYTES,
    LEADER_ACCEPT,
    LEADER_SCHEMAS,
    STAGE0_ACCEPT,
    STAGE0_SCHEMAS,
    Action,
    Header,
    Limits,
    LinkState,
    Schema,
    parse_header,
)
from engine.wire.meta import peer_error
from engine.wire.problem import Problem
from engine.wire.result import Result

FIRST_BYTES = HEADER_BYTES + INLINE_BYTES


class _Answers(LinkState):
    """Results are held against what Stage 0 expects (`wire.expected`), not against each other."""

    def problem(self, header: Header) -> Problem | None:
        return None


class _End:
    """What both ends have. `state` holds the ids of what went down: sent, or accepted."""

    def __init__(
        self,
        pair: Pair,
        limits: Limits,
        shapes: Shapes,
        tp_plan: str,
        blackbox: BlackBox | None = None,
        pin: bool = False,
        wire: Dialect = PP,
    ) -> None:
        self.wire = wire
        self.pair = pair
        self.limits = limits
        self.shapes = shapes
        self.tp_plan = tp_plan
        self.state = LinkState()
        self.gate = pair.down.gate
        self._blackbox = blackbox
        self._pin = pin

    def next_call_id(self) -> int:
        return self.state.last_call_id + 1

    def _schemas(self) -> dict[Schema, int]:
        """What the leader takes, with the version of the envelope that this job speaks."""
        return {**LEADER_SCHEMAS, Schema.PP_ENVELOPE: self.wire.version}

    def commit(self, action: str, ids: dict[str, int]) -> None:
        if self._blackbox is not None:
            self._blackbox.commit(action, self.pair.down.name, ids)


class Stage0End(_End):
    """Rank 0's end. Its owner is the comms thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffers: list[PayloadBuffer] = []
        self._under_way: list[tuple[PreparedFrame, list[Posted]]] = []

    def prepare(self, envelope: Envelope) -> PreparedFrame:
        """Everything that can fail, in a payload buffer that no message under way uses.

        Raises:
            PreflightError, CallCountError: nothing was sent.
        """
        buffer = self._buffers.pop() if self._buffers else PayloadBuffer("cpu", self._pin)
        return prepare(
            envelope,
            call_id=self.next_call_id(),
            link=self.state,
            shapes=self.shapes,
            limits=self.limits,
            buffer=buffer,
            wire=self.wire,
        )

    def post(self, frame: PreparedFrame) -> None:
        """Send a prepared frame, without waiting for the leader to take it.

        Raises:
            PreflightError: the frame's buffer was used again since it was checked; nothing was sent.
            CommError: the leader is gone.
        """
        if frame.stale:
            raise PreflightError("this frame's payload was overwritten since prepare", code="TP-2128")
        self.gate.ids = frame.header.ids()
        self.commit(f"send {frame.header.action.name}", self.gate.ids)
        self.state.advance(frame.header)
        self._under_way.append((frame, [self.pair.down.post(message) for message in messages(frame)]))

    def settle(self, call_id: int) -> None:
        """Wait until the frames up to this one are through; the answer to an envelope proves it, so it costs nothing.

        Raises:
            CommError: the leader is gone.
        """
        while self._under_way and self._under_way[0][0].header.call_id <= call_id:
            frame, posted = self._under_way[0]
            for message in posted:
                message.wait()
            del self._under_way[0]
            if frame.buffer is not None:
                self._buffers.append(frame.buffer)

    def expect(self) -> Posted:
        """Make room for the next answer."""
        return self.pair.up.post(torch.zeros(FIRST_BYTES, dtype=torch.uint8))

    def rest(self, room: Posted | None) -> None:
        """Say that this rank waits for what comes into `room`, and sends nothing before; None: that it waits no more.

        So the referee can prove that nobody comes: see `engine.referee.judge`.
        """
        if self._blackbox is not None:
            self._blackbox.wait_in(room.number if room is not None else 0)

    def read(self, first: Posted) -> Result:
        """The answer that has arrived, in the receiver order of the contract (section 4), in memory of its own.

        Raises:
            FrameError: the answer is refused.
            CommError: the leader is gone.
        """
        start = first.tensor.numpy().tobytes()
        header = parse_header(
            start[:HEADER_BYTES], _Answers(), self.limits, accept=STAGE0_ACCEPT, schemas=STAGE0_SCHEMAS
        )
        self.commit("recv RESULT", header.ids())
        meta = parse_meta(header, _meta(header, start, self._receive))
        specs = check_result(header, meta, shapes=self.shapes)
        payload = None
        if header.payload_bytes:
            payload = self._receive(PayloadBuffer("cpu", self._pin).view(header.payload_bytes))
        return rebuild_result(header, meta, payload, shapes=self.shapes, specs=specs)

    def _receive(self, room: torch.Tensor) -> torch.Tensor:
        self.pair.up.post(room).wait()
        return room


class LeaderEnd(_End):
    """The mesh leader's end. `repeats` counts envelopes that came twice, and were dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffer = PayloadBuffer("cpu", self._pin)
        self.repeats = 0
        self._answers = LinkState()
        self._answer_buffer = PayloadBuffer("cpu", self._pin)
        self._first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        self._last_infer = b""

    def receive(self) -> Received | None:
        """Wait for the next frame and validate the whole of it; None for an exact repeat of the last envelope.

        A repeat is received to its end and dropped: its one answer is on its way, and no cache advances twice. Any
        other repeated or older id is refused like every other corruption.

        Raises:
            FrameError, CallCountError: the frame is refused; nothing of it is used.
            PeerError: Stage 0 said ERROR.
            CommError: Stage 0 is gone.
        """
        self.commit("wait header", {})
        start = self._receive(self._first).numpy().tobytes()
        if self._last_infer and start[:HEADER_BYTES] == self._last_infer:
            self._drop(start)
            return None
        header = parse_header(
            start[:HEADER_BYTES], self.state, self.limits, accept=LEADER_ACCEPT, schemas=self._schemas()
        )
        self.gate.ids = header.ids()
        self.commit(f"recv {header.action.name}", self.gate.ids)
        meta = parse_meta(header, _meta(header, start, self._receive)) if header.meta_bytes else {}
        envelope = None
        if header.action is Action.INFER:
            # Judged before room is made for the payload.
            specs = check_specs(header, meta, shapes=self.shapes, tp_plan=self.tp_plan, link=self.state, wire=self.wire)
            payload = self._receive(self.buffer.view(header.payload_bytes))
            envelope = rebuild(
                header,
                meta,
                payload,
                shapes=self.shapes,
                tp_plan=self.tp_plan,
                link=self.state,
                specs=specs,
                wire=self.wire,
            )
        self.state.advance(header)
        self._last_infer = start[:HEADER_BYTES] if header.action is Action.INFER else b""
        if header.action is Action.ERROR:
            raise peer_error(header, meta)
        return Received(header, meta, envelope)

    def answer(self, result: Result) -> None:
        """Send the one result of an envelope, and wait until Stage 0 has it.

        Raises:
            PreflightError: the result breaks its schema; nothing was sent.
            CommError: Stage 0 is gone.
        """
        frame = prepare_result(
            result, link=self._answers, shapes=self.shapes, limits=self.limits, buffer=self._answer_buffer
        )
        self.commit("send RESULT", result.ids())
        if result.ok:
            self._answers.advance(frame.header)
        self.pair.up.exchange_all(messages(frame))

    def _drop(self, start: bytes) -> None:
        header = parse_header(start[:HEADER_BYTES], _Answers(), self.limits, schemas=self._schemas())
        _meta(header, start, self._receive)
        self._receive(torch.empty(header.payload_bytes, dtype=torch.uint8))
        self.repeats += 1
        self.commit("drop repeat", header.ids())

    def _receive(self, room: torch.Tensor) -> torch.Tensor:
        return self.pair.down.exchange(room)


def messages(frame: PreparedFrame) -> list[torch.Tensor]:
    """A frame as the messages that carry it."""
    inline = frame.meta if len(frame.meta) <= INLINE_BYTES else b""
    start = bytearray((frame.header_bytes + inline).ljust(FIRST_BYTES, b"\0"))
    parts = [torch.frombuffer(start, dtype=torch.uint8)]
    if frame.meta and not inline:
        parts.append(torch.frombuffer(bytearray(frame.meta), dtype=torch.uint8))
    if frame.payload is not None:
        parts.append(frame.payload)
    return parts


def _meta(header: Header, start: bytes, receive: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """The meta's bytes: behind the header, or, where they did not fit, in a message of their own."""
    if header.meta_bytes <= INLINE_BYTES:
        return start[HEADER_BYTES : HEADER_BYTES + header.meta_bytes]
    return receive(torch.empty(header.meta_bytes, dtype=torch.uint8)).numpy().tobytes()
