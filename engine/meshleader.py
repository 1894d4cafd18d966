"""The loop of the mesh leader in pp: envelope in, the mesh told, phase B, one answer out. Always one answer.

The whole envelope is received and validated before any collective of the mesh. What is refused is refused on both
sides: the mesh hears ERROR, Stage 0 an error result, and nobody is left waiting.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

from engine.comm.group import Phase
from engine.comm.p2p import LeaderEnd
from engine.comm.pair import Pair
from engine.comm.transport import BroadcastLink, Received
from engine.errors import EngineError, PreflightError
from engine.lifecycle import RankExit, RankState
from engine.rank import RankContext
from engine.record import Clock, chunk_record
from engine.stage1 import MeshResult, Stage1
from engine.wire.dialect import pp_wire
from engine.wire.envelope import Envelope
from engine.wire.frame import prepare, prepare_control
from engine.wire.header import Action
from engine.wire.meta import error_meta
from engine.wire.result import Result


class MeshLeader:
    """Between two links: `up` to Stage 0, `mesh` to the other mesh ranks. Frames keep their call_id on both."""

    def __init__(self, context: RankContext, up: LeaderEnd, mesh: BroadcastLink, stage1: Stage1) -> None:
        self.context = context
        self.up = up
        self.mesh = mesh
        self.stage1 = stage1
        self._clock = Clock()
        self._idle_since_s = time.perf_counter()
        self._mesh_waits = True  # for a header: so it may still be ended in good order
        self._owed: dict[str, int] | None = None  # ids of the envelope that has no answer yet
        self._stage0_hears = True

    @classmethod
    def of(cls, context: RankContext, pair: Pair, mesh: BroadcastLink, stage1: Stage1) -> MeshLeader:
        """With its end of the pp link, which knows the same sizes and limits as the mesh link."""
        pin = mesh.buffer.device.type == "cuda"
        wire = pp_wire(context.config.noise_scale)
        up = LeaderEnd(pair, mesh.limits, mesh.shapes, mesh.tp_plan, context.blackbox, pin, wire)
        return cls(context, up, mesh, stage1)

    def run(self) -> None:
        """Serve envelopes until SHUTDOWN. Raises PeerError on ERROR, and whatever else ends this rank early."""
        live = self.context.config.liveness
        try:
            while True:
                with self.context.watchdog.budget(
                    "the wait for an envelope", live.watchdog_s, RankExit.ORPHANED, "FM-40"
                ):
                    received = self._receive()
                if received is None:
                    self.context.warn(f"{self.up.repeats} envelope(s) came twice and were dropped")
                elif received.header.action is Action.SHUTDOWN:
                    self._pass_on(received)
                    self.context.report.move(RankState.DRAINING)
                    return
                elif received.envelope is None:
                    self._pass_on(received)  # NOOP: the mesh hears of rank 0 through its leader
                else:
                    self._serve(received.envelope, received.header.call_id)
        except BaseException as error:
            if isinstance(error, PreflightError) and error.fm is None:
                error.fm = "FM-23"  # an envelope that came well, and cannot be passed on
            self._dismiss(self.context.named(error))
            raise

    def _receive(self) -> Received | None:
        try:
            return self.up.receive()
        except EngineError as error:
            # Whatever was refused might have been an envelope: it gets its answer. A peer that is gone, or has said
            # ERROR itself, listens no more.
            self._stage0_hears = error.exit_code == int(RankExit.TRIPWIRE)
            self._owed = error.ids or {"call_id": self.up.next_call_id()}
            raise

    def _serve(self, received: Envelope, call_id: int) -> None:
        """The path of one chunk on the leader."""
        context, live = self.context, self.context.config.liveness
        plan = received.plan
        self._owed = plan.ids(call_id)
        envelope = self._on_device(received)
        frame = prepare(
            envelope,
            call_id=call_id,
            link=self.mesh.state,
            shapes=self.mesh.shapes,
            limits=self.mesh.limits,
            buffer=self.mesh.buffer,
        )
        self._clock.mark("t_frame_ms")
        t_mesh_idle_ms = (time.perf_counter() - self._idle_since_s) * 1e3
        self._mesh_waits = False
        with context.watchdog.budget("phase B", live.phase_budget_s, RankExit.PHASE_BUDGET, "FM-41"):
            self.mesh.send(frame)
            result = self.stage1.step(envelope, call_id)
        self._mesh_waits = True
        self._clock.mark("t_b_ms")
        self._idle_since_s = time.perf_counter()
        with context.watchdog.budget("the answer", live.watchdog_s, RankExit.TRANSPORT, "FM-41"):
            self.up.answer(self._answer(envelope, call_id, result, t_mesh_idle_ms))
        self._owed = None
        self._clock.mark("t_c_ms")
        record = chunk_record(envelope, call_id, result, self._clock.turn())
        context.keep(record | {"t_mesh_idle_ms": t_mesh_idle_ms}, result)

    def _answer(self, envelope: Envelope, call_id: int, result: MeshResult, t_mesh_idle_ms: float) -> Result:
        plan = envelope.plan
        return Result(
            call_id=call_id,
            chunk_index=plan.chunk_index,
            cache_epoch=plan.cache_epoch,
            control_epoch=plan.control_epoch,
            ok=True,
            error_code=None,
            error_message=None,
            observed_generator_calls=result.observed_generator_calls,
            mesh_current_start_frame=plan.current_start_frame + self.context.config.geometry.frames_per_chunk,
            output_digest_i64=result.output_digest_i64,
            t_b_ms=result.t_b_ms,
            t_mesh_idle_ms=t_mesh_idle_ms,
            latents_out_BFCHW=result.latents_out_BFCHW.to("cpu"),
        )

    def _on_device(self, envelope: Envelope) -> Envelope:
        """Envelopes arrive in host memory."""
        device = self.mesh.buffer.device
        if device.type == "cpu":
            return envelope
        tensors = {name: None if t is None else t.to(device) for name, t in envelope.tensors.items()}
        return dataclasses.replace(envelope, tensors=tensors)

    def _pass_on(self, received: Received) -> None:
        """The same control frame, under the same id, for the mesh."""
        with self.context.watchdog.budget(
            "a control frame", self.context.config.liveness.watchdog_s, RankExit.TRANSPORT, "FM-41"
        ):
            header = received.header
            self.mesh.send(prepare_control(header.action, call_id=header.call_id, link=self.mesh.state))

    def _dismiss(self, error: BaseException) -> None:
        """ERROR to a mesh that waits for a header, an error result to a Stage 0 that is owed one."""
        self.up.gate.phase = Phase.LINK  # phase B is over, however it ended
        with self.context.watchdog.budget(
            "the farewell", self.context.config.liveness.watchdog_s, RankExit.TRANSPORT, "FM-41"
        ):
            if self._mesh_waits:
                self._try("the mesh", lambda: self._say_error(error))
            if self._owed is not None and self._stage0_hears:
                self._try("Stage 0", lambda: self._say_failed(error))

    def _say_error(self, error: BaseException) -> None:
        call_id = max(self.mesh.next_call_id(), self.up.state.last_call_id)
        self.mesh.send(prepare_control(Action.ERROR, call_id=call_id, link=self.mesh.state, meta=error_meta(error)))

    def _say_failed(self, error: BaseException) -> None:
        meta = error_meta(error)
        self.up.answer(Result.failed(self._owed or {}, self.up.state.control_epoch, meta["code"], meta["message"]))

    def _try(self, whom: str, say: Callable[[], None]) -> None:
        try:
            say()
        except EngineError as second:
            # The first error is the one to report; that the farewell failed too is worth a line.
            print(f"rank {self.context.env.rank}: the farewell to {whom} failed too: {second}", file=sys.stderr)
