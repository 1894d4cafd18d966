"""The link of v0 and v1.1: frames travel as broadcasts on `mesh_pg`, from the leader to every other mesh rank.

A heartbeat costs one message, a frame two: the first message has a fixed size and holds the header and, behind it, a
meta that fits (`INLINE_BYTES`); the payload is the second. Only a longer meta costs a third. Header and meta stay on
the CPU, so reading a header never waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.blackbox import BlackBox
from engine.comm.group import Group
from engine.errors import PreflightError
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import PayloadBuffer, PreparedFrame, check_specs, parse_meta, rebuild
from engine.wire.header import HEADER_BYTES, Action, Header, Limits, LinkState, parse_header
from engine.wire.meta import peer_error

# Room for the meta behind the header. The meta of an INFER frame takes about 650 bytes; a small message of 2 KiB takes
# as long as one of 104 bytes, and one message less is worth more than all of the checks cost.
INLINE_BYTES = 2048 - HEADER_BYTES


@dataclass(frozen=True)
class Received:
    """What came over the link: the header, the raw meta (for digests) and, for INFER, the rebuilt envelope.

    The envelope's tensors are views of the link's buffer: they are valid until the next `receive`.
    """

    header: Header
    meta: dict[str, Any]
    envelope: Envelope | None


class BroadcastLink:
    """One end of the link. The leader sends, every other member receives; both keep the id rules in `state`."""

    def __init__(
        self,
        group: Group,
        limits: Limits,
        shapes: Shapes,
        tp_plan: str,
        device: str = "cpu",
        blackbox: BlackBox | None = None,
    ) -> None:
        self.group = group
        self.limits = limits
        self.shapes = shapes
        self.tp_plan = tp_plan
        self.state = LinkState()
        self.buffer = PayloadBuffer(device=device)
        self._blackbox = blackbox
        self._first = torch.zeros(HEADER_BYTES + INLINE_BYTES, dtype=torch.uint8)

    def next_call_id(self) -> int:
        return self.state.last_call_id + 1

    def send(self, frame: PreparedFrame) -> None:
        """Broadcast a prepared frame. From the header on, every other member waits for the rest of it.

        Raises:
            PreflightError: the frame's buffer was used again since it was checked; nothing was sent.
        """
        if frame.stale:
            raise PreflightError("this frame's payload was overwritten since prepare", code="TP-2128")
        self._commit(f"send {frame.header.action.name}", frame.header)
        self.state.advance(frame.header)
        if self.group.size == 1:
            return
        inline = frame.meta if len(frame.meta) <= INLINE_BYTES else b""
        start = frame.header_bytes + inline
        self._first[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        self.group.broadcast(self._first)
        if len(frame.meta) > INLINE_BYTES:
            self.group.broadcast(torch.frombuffer(bytearray(frame.meta), dtype=torch.uint8))
        if frame.payload is not None:
            self.group.broadcast(frame.payload)

    def receive(self) -> Received:
        """Wait for the next frame, in the receiver order of the contract (section 4).

        Raises:
            FrameError: the frame is refused; nothing of it is used.
            PeerError: the leader said ERROR.
        """
        self._commit("wait header", None)
        self.group.broadcast(self._first)
        start = self._first.numpy().tobytes()
        header = parse_header(start[:HEADER_BYTES], self.state, self.limits)
        self._commit(f"recv {header.action.name}", header)
        meta: dict[str, Any] = {}
        if header.meta_bytes:
            meta = parse_meta(header, self._meta(header, start))
        envelope = None
        if header.action is Action.INFER:
            # Judged before room is made for the payload.
            specs = check_specs(header, meta, shapes=self.shapes, tp_plan=self.tp_plan, link=self.state)
            payload = self.group.broadcast(self.buffer.view(header.payload_bytes))
            envelope = rebuild(
                header, meta, payload, shapes=self.shapes, tp_plan=self.tp_plan, link=self.state, specs=specs
            )
        self.state.advance(header)
        if header.action is Action.ERROR:
            raise peer_error(header, meta)
        return Received(header, meta, envelope)

    def _meta(self, header: Header, start: bytes) -> bytes:
        """The meta's bytes: behind the header, or, where they did not fit, in a message of their own."""
        if header.meta_bytes <= INLINE_BYTES:
            return start[HEADER_BYTES : HEADER_BYTES + header.meta_bytes]
        raw = torch.empty(header.meta_bytes, dtype=torch.uint8)
        return self.group.broadcast(raw).numpy().tobytes()

    def _commit(self, action: str, header: Header | None) -> None:
        if self._blackbox is not None:
            self._blackbox.commit(action, self.group.name, header.ids() if header else {})
