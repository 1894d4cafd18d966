"""The loop of every mesh rank but the leader: receive, complete what the plan leaves to it, phase B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.comm.transport import BroadcastLink
from engine.lifecycle import RankExit, RankState
from engine.rank import RankContext
from engine.record import Clock, chunk_record
from engine.stage1 import Stage1
from engine.wire.header import Action

if TYPE_CHECKING:  # a generator-only worker never imports the codecs
    from engine.materials import Materials


def follow(context: RankContext, link: BroadcastLink, stage1: Stage1, materials: Materials | None) -> None:
    """Serve frames until SHUTDOWN. Raises PeerError on ERROR, and whatever else ends this rank early."""
    live, report = context.config.liveness, context.report
    clock = Clock()
    while True:
        with context.watchdog.budget("the wait for a header", live.watchdog_s, RankExit.ORPHANED, "FM-40"):
            received = link.receive()
        if received.header.action is Action.SHUTDOWN:
            report.move(RankState.DRAINING)
            return
        if received.envelope is None:
            continue  # NOOP: the leader is alive
        clock.mark("t_frame_ms")
        envelope = received.envelope if materials is None else materials.complete(received.envelope)
        clock.mark("t_a_ms")
        with context.watchdog.budget("phase B", live.phase_budget_s, RankExit.PHASE_BUDGET, "FM-41"):
            result = stage1.step(envelope, received.header.call_id)
        clock.mark("t_b_ms")
        if materials is not None and materials.parts.vae_decoder:
            materials.decode(result.latents_out_BFCHW)
        clock.mark("t_c_ms")
        context.keep(chunk_record(envelope, received.header.call_id, result, clock.turn()), result)
