"""Rank 0's loop: phases A, B and C of every chunk, then SHUTDOWN. Peers are never left waiting for a header."""

from __future__ import annotations

import itertools
import sys

from engine.comm.transport import BroadcastLink
from engine.errors import CallCountError, EngineError, PreflightError, SinkError, SourceError
from engine.lifecycle import Doing, RankExit, RankState
from engine.materials import Materials
from engine.rank import RankContext
from engine.record import Clock, chunk_record
from engine.recorder import Recorder
from engine.sinks.writer import SinkWriter
from engine.stage0 import Stage0
from engine.stage1 import Stage1
from engine.watchdog import Heartbeat
from engine.wire.envelope import Envelope
from engine.wire.frame import PreparedFrame, prepare, prepare_control
from engine.wire.header import Action
from engine.wire.meta import error_meta


def lead(context: RankContext, link: BroadcastLink, stage1: Stage1, materials: Materials) -> None:
    """Make the run's chunks until the timeline's end or a drain. Raises what ends the stream early."""
    config, report = context.config, context.report
    context.open_account()
    heartbeat = Heartbeat(config.liveness.heartbeat_s, lambda: beat(context, link))
    sinks: SinkWriter | None = None
    peers_wait = True  # for a header: so this rank may still end them in good order
    try:
        heartbeat.start()
        recorder = Recorder(context.run_dir, config.run.record_latents)
        sinks = context.open_writer()
        materials.at = context.doing
        stage0 = Stage0(config, context.timeline, materials)
        clock = Clock()
        for _ in range(config.run.chunks) if config.run.chunks else itertools.count():
            if stage0.source_ended():
                break
            if not context.goes_on(stage0.chunk_index + 1, lambda: heartbeat.failure is None, clock.restart):
                break
            if heartbeat.failure is not None:
                peers_wait = False
                raise heartbeat.failure
            context.doing(Doing.PREPARE)
            try:
                envelope = stage0.step()
            except SourceError as error:  # nothing was accepted for it
                context.fail_after_drain(error)
                break
            context.count("accepted")
            clock.mark("t_a_ms")
            context.doing(Doing.MESH)
            with heartbeat.hold():
                call_id = link.next_call_id()
                frame = prepare_infer(stage0.for_link(envelope), call_id, link)
                peers_wait = False
                budget_s = config.liveness.phase_budget_s
                with context.watchdog.budget("phase B", budget_s, RankExit.PHASE_BUDGET, "FM-41"):
                    link.send(frame)
                    clock.mark("t_frame_ms")
                    result = stage1.step(envelope, call_id)
                peers_wait = True
            clock.mark("t_b_ms")
            context.doing(Doing.DECODE)
            pixels_THWC = stage0.accept(result.latents_out_BFCHW, envelope.plan)
            context.doing(Doing.SINK)
            sinks.put(pixels_THWC.numpy(), envelope.plan.chunk_index, envelope.prompt or "")
            recorder.keep(envelope.plan.chunk_index, result.latents_out_BFCHW, pixels_THWC)
            clock.mark("t_c_ms")
            context.keep(chunk_record(envelope, call_id, result, clock.turn()), result)
        context.drain.begin(ended=True)
        report.move(RankState.DRAINING)
        context.doing(Doing.SINK)
        report.outputs = sinks.close()
        context.settle()
        sinks = None
        recorder.close()
        heartbeat.stop()
        peers_wait = False
        with context.watchdog.budget("SHUTDOWN", config.liveness.watchdog_s, RankExit.TRANSPORT, "FM-41"):
            say(link, Action.SHUTDOWN)
        context.raise_failure()
    except BaseException as error:
        if sinks is not None:
            sinks.abort()
        context.settle()
        if peers_wait:
            heartbeat.stop()
            dismiss(context, link, context.named(error))
        raise


def prepare_infer(envelope: Envelope, call_id: int, link: BroadcastLink) -> PreparedFrame:
    """Everything that can fail before the peers are committed."""
    return prepare(
        envelope, call_id=call_id, link=link.state, shapes=link.shapes, limits=link.limits, buffer=link.buffer
    )


def say(link: BroadcastLink, action: Action) -> None:
    """NOOP or SHUTDOWN: a header, nothing else."""
    link.send(prepare_control(action, call_id=link.next_call_id(), link=link.state))


def beat(context: RankContext, link: BroadcastLink) -> None:
    """NOOP. A peer that does not take it keeps the whole loop waiting, so the beat has a deadline of its own."""
    with context.watchdog.budget("the heartbeat", context.config.liveness.watchdog_s, RankExit.TRANSPORT, "FM-41"):
        say(link, Action.NOOP)


def dismiss(context: RankContext, link: BroadcastLink, error: BaseException) -> None:
    """Peers wait for a header: send them one. A refusal by `prepare` or a sink is ours alone, so they drain."""
    drains = isinstance(error, PreflightError | CallCountError | SinkError)
    try:
        with context.watchdog.budget("the farewell", context.config.liveness.watchdog_s, RankExit.TRANSPORT, "FM-41"):
            if drains:
                say(link, Action.SHUTDOWN)
            else:
                meta = error_meta(error)
                link.send(prepare_control(Action.ERROR, call_id=link.next_call_id(), link=link.state, meta=meta))
    except EngineError as second:
        # The first error is the one to report; that the farewell failed too is worth a line.
        print(f"rank 0: the farewell to the mesh failed too: {second}", file=sys.stderr, flush=True)
