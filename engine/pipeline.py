"""Rank 0's loop in pp: phase A of the next chunk goes out before this one's result is decoded, and the mesh works on.

One turn: take a result, remember its latents, decode what the next anchor needs, send the next envelope, decode the
rest, emit. With recompute from pixels (R0a) the anchor lies in the chunk's latent F - K; without it, or with anchors
from latents, nothing is decoded before the next envelope.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from engine import tripwires
from engine.comm.p2p import Stage0End
from engine.comm.topology import Groups
from engine.errors import EngineError, SourceError, TripwireError
from engine.lifecycle import Doing, RankExit, RankState
from engine.materials import Materials
from engine.measures import overlap, stages
from engine.overlap import Arrival, Comms
from engine.plan import ChunkPlan
from engine.rank import RankContext
from engine.record import decisions
from engine.recorder import Recorder
from engine.report import rss_bytes
from engine.sinks.writer import SinkWriter
from engine.stage0 import Stage0
from engine.streams import CommStream
from engine.wire.dialect import pp_wire
from engine.wire.envelope import Shapes
from engine.wire.expected import Fate
from engine.wire.header import Limits
from engine.wire.result import Result


@dataclass(frozen=True)
class Flight:
    """A chunk on its way to the mesh and back. Times in milliseconds since the loop began."""

    plan: ChunkPlan
    prompt: str
    tA0_ms: float
    tA1_ms: float


class Pipeline:
    """Rank 0 of a pp plan, from its first envelope to SHUTDOWN."""

    def __init__(self, context: RankContext, comms: Comms, materials: Materials) -> None:
        self.context = context
        self.comms = comms
        materials.at = context.doing
        self.stage0 = Stage0(context.config, context.timeline, materials)
        context.open_account()
        self._flying: dict[int, Flight] = {}
        self._emitting = False
        self._repeats = 0
        self._began_s = time.monotonic()
        loop_ns = context.report.clock["loop_ns"] = int(self._began_s * 1e9)
        self._stages = context.open_stages(loop_ns)
        self._last_emit_ms: float | None = None
        self._pixels: list[torch.Tensor] = []

    @classmethod
    def of(cls, context: RankContext, groups: Groups, materials: Materials, device: str) -> Pipeline:
        """With its comms thread, and that thread's end of the pp link. Raises EngineError: the plan has none."""
        config = context.config
        if groups.pp is None:
            raise EngineError(f"plan {config.plan.tp_plan} has no pp_pg", exit_code=int(RankExit.BAD_CONFIG))
        link = Stage0End(
            groups.pp,
            Limits.of(config),
            Shapes.of(config),
            config.plan.tp_plan,
            context.blackbox,
            device.startswith("cuda"),
            pp_wire(config.noise_scale),
        )
        comms = Comms(link, config.pipeline, config.liveness, context.watchdog, CommStream(device), context.leave_now)
        return cls(context, comms, materials)

    def run(self) -> None:
        """Make the run's chunks until the timeline's end or a drain. Raises what ends the stream early."""
        config, report = self.context.config, self.context.report
        sinks: SinkWriter | None = None
        self.comms.start()
        try:
            recorder = Recorder(self.context.run_dir, config.run.record_latents)
            sinks = self.context.open_writer()
            while True:
                self._feed()
                if not self._flying:
                    if self._ended() or not self.context.goes_on(
                        self.stage0.chunk_index + 1, self.comms.well, self._resumed
                    ):
                        break
                    continue
                self.context.doing(Doing.MESH)
                arrival, fate = self.comms.take(lambda: self.stage0.cache_epoch)
                if fate is Fate.ACCEPTED:
                    self._emit(arrival, sinks, recorder)
                else:
                    self._drop(arrival.result, fate)
            self.context.drain.begin(ended=True)
            report.move(RankState.DRAINING)
            self.context.doing(Doing.SINK)
            report.outputs = sinks.close()
            self.context.settle()
            sinks = None
            recorder.close()
            self._report_overlap()
            self.comms.close()
            self.context.raise_failure()
        except BaseException as error:
            if sinks is not None:
                sinks.abort()
            self.context.settle()
            self.comms.close(self.context.named(error))
            raise

    def _feed(self) -> float:
        """Phase A of as many chunks as may go out now. Returns the milliseconds spent on encoding their anchors."""
        t_encode_ms = 0.0
        while self._may_feed():
            self.context.doing(Doing.PREPARE)
            tA0_ms = self._now_ms()
            try:
                envelope = self.stage0.step()
            except SourceError as error:  # nothing was accepted for it
                self.context.fail_after_drain(error)
                break
            t_encode_ms += self.stage0.materials.t_encode_ms
            self.context.count("accepted")
            plan = envelope.plan
            self._flying[plan.chunk_index] = Flight(plan, envelope.prompt or "", tA0_ms, self._now_ms())
            self.comms.put(self.stage0.for_link(envelope))
        return t_encode_ms

    def _ended(self) -> bool:
        chunks = self.context.config.run.chunks
        return 0 < chunks <= self.stage0.chunk_index + 1 or self.stage0.source_ended()

    def _may_feed(self) -> bool:
        config, steering = self.context.config, self.context.steering
        if self._ended() or self.context.ending() or not self.comms.room():
            return False
        if steering is not None and steering.holds(self.stage0.chunk_index + 1):
            return False
        following = self.stage0.next_chunk()
        if following.recompute and self._flying:
            return False  # its context is made of all that came before
        if following.cut:
            # What is half decoded is finished first. What still flies is stale from the cut on, or finished too.
            return not self._emitting and (config.pipeline.cut == "discard" or not self._flying)
        return True

    def _emit(self, arrival: Arrival, sinks: SinkWriter, recorder: Recorder) -> None:
        """Phase C of one chunk, with phase A of the next one in its middle."""
        result, stage0 = arrival.result, self.stage0
        flight = self._flying.pop(result.chunk_index)
        tRecv_ms = self._now_ms()
        latents_BFCHW = self._checked(result, flight.plan)
        stage0.remember(latents_BFCHW, flight.plan)
        first = self._decoded_before_feed(latents_BFCHW.shape[1])
        self._emitting = True
        self.context.doing(Doing.DECODE)
        began_ms = self._now_ms()
        pixels = []
        if first:
            self._commit("decode first", result)
            pixels.append(stage0.develop(latents_BFCHW[:, :first]))
        tFeed_ms = self._now_ms()
        t_encode_ms = self._feed()
        self.comms.hand_over()
        inside_ms = self._now_ms() - tFeed_ms
        self.context.doing(Doing.DECODE)
        if first < latents_BFCHW.shape[1]:
            self._commit("decode", result)
            pixels.append(stage0.develop(latents_BFCHW[:, first:]))
        self._emitting = False
        pixels_THWC = torch.cat(pixels)
        self.context.doing(Doing.SINK)
        sinks.put(pixels_THWC.numpy(), result.chunk_index, flight.prompt)
        self._commit("emit", result)
        recorder.keep(result.chunk_index, latents_BFCHW, pixels_THWC)
        feed = {
            "tFeed_ms": tFeed_ms,
            "t_inside_ms": inside_ms,
            "t_anchor_ms": (tFeed_ms - began_ms if first else 0.0) + t_encode_ms,
            "latents_before_feed": first,
        }
        self._record(flight, result, tRecv_ms, feed, arrival)

    def _decoded_before_feed(self, frames: int) -> int:
        """Latents of the newest chunk that the next envelope needs decoded; all of them if anchor-first is off."""
        following = self.stage0.next_chunk()
        if not following.recompute or self.context.config.schedule.anchor != "reencode":
            return 0
        return min(frames, self.stage0.latents_to_anchor()) if self.context.config.pipeline.anchor_first else frames

    def _drop(self, result: Result, fate: Fate) -> None:
        """A result that must not be decoded: counted and recorded."""
        self._commit(f"drop {fate.value}", result)
        self.context.journal.info("drop", f"the result of chunk {result.chunk_index} is {fate.value}", ids=result.ids())
        if fate is Fate.STALE:
            self.stage0.forget(self._flying.pop(result.chunk_index).plan)
            self.context.dropped("stale")
        else:
            self._repeats += 1
            self.context.dropped("repeated", counted=False)
            self.context.warn(
                f"{self._repeats} result(s) came twice and were dropped; the last for chunk {result.chunk_index}"
            )

    def _checked(self, result: Result, plan: ChunkPlan) -> torch.Tensor:
        """The latents, once the result is proved to be the one that the mesh made, of the chunk that was asked for.

        Raises:
            TripwireError: calls, position or bytes are not those of the plan.
        """
        latents_BFCHW = result.latents_out_BFCHW
        if latents_BFCHW is None:
            raise TripwireError("a good result came without latents", fm="FM-06", ids=result.ids())
        digest = tripwires.digest({"latents_out": latents_BFCHW}) if result.output_digest_i64 else 0
        end_frame = plan.current_start_frame + latents_BFCHW.shape[1]
        for name, got, expected, fm in (
            ("observed_generator_calls", result.observed_generator_calls, plan.expected_calls, "FM-02"),
            ("mesh_current_start_frame", result.mesh_current_start_frame, end_frame, "FM-10"),
            ("output_digest_i64", digest, result.output_digest_i64, "FM-30"),
        ):
            if got != expected:
                raise TripwireError(
                    f"the result of chunk {plan.chunk_index}: {name} is {got}, expected {expected}",
                    fm=fm,
                    ids=result.ids(),
                    evidence={"field": name, "got": got, "expected": expected},
                )
        return latents_BFCHW

    def _record(
        self, flight: Flight, result: Result, tRecv_ms: float, feed: dict[str, float], arrival: Arrival
    ) -> None:
        tEmit_ms = self._now_ms()
        d_in, d_out = self.comms.depths()
        record: dict[str, Any] = {
            **decisions(flight.plan, result.call_id),
            "observed_generator_calls": result.observed_generator_calls,
            "output_digest_i64": result.output_digest_i64,
            "t_a_ms": flight.tA1_ms - flight.tA0_ms,
            "t_b_ms": result.t_b_ms,
            "t_c_ms": tEmit_ms - tRecv_ms - feed["t_inside_ms"],
            "t_mesh_idle_ms": result.t_mesh_idle_ms,
            "period_ms": tEmit_ms - (self._last_emit_ms or 0.0),
            "tA0_ms": flight.tA0_ms,
            "tA1_ms": flight.tA1_ms,
            "tSent_ms": None if arrival.sent_s is None else (arrival.sent_s - self._began_s) * 1e3,
            "tArrived_ms": (arrival.arrived_s - self._began_s) * 1e3,
            "tRecv_ms": tRecv_ms,
            "tEmit_ms": tEmit_ms,
            **feed,
            "d_in": d_in,
            "d_out": d_out,
            "rss_bytes": rss_bytes(),
        }
        record |= stages(record, self._last_emit_ms)
        self._last_emit_ms = tEmit_ms
        self.context.keep_record(record)
        self._stages.add(record)

    def _report_overlap(self) -> None:
        found = overlap(self.context.report.chunks)
        pipeline = self.context.config.pipeline
        most_in, most_out = self.comms.most()
        self.context.report.generator |= {
            "overlap": found.to_dict() if found is not None else None,
            "d_in": pipeline.d_in,
            "d_out": pipeline.d_out,
            "d_in_most": most_in,
            "d_out_most": most_out,
            "repeated_results": self._repeats,
        }

    def _resumed(self) -> None:
        """A pause is no part of a chunk's period."""
        self._last_emit_ms = self._now_ms()

    def _commit(self, action: str, result: Result) -> None:
        """What Stage 0 does with a result, beside what its comms thread records: so their order can be proved."""
        self.context.blackbox.commit(action, "pp_pg", result.ids())

    def _now_ms(self) -> float:
        return (time.monotonic() - self._began_s) * 1e3
