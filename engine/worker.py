"""A rank's entry: composes the parts of its role and runs them. The only composer of the engine.

    python -m torch.distributed.run --nproc-per-node=N -m engine.worker --config RUN/config.toml --run-dir RUN

The path of one chunk: `lead` (rank 0) or `follow` (the others) -> `Stage1.step` -> `DiT.forward`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import config as configuration
from engine.blackbox import BlackBox
from engine.comm import parity
from engine.comm.group import Phase
from engine.comm.topology import (
    Groups,
    MeetingPoint,
    Topology,
    create_groups,
    effective_comm_backend,
    effective_device,
)
from engine.comm.transport import BroadcastLink
from engine.config import EngineConfig, RankEnv
from engine.errors import CommError, EngineError, PreflightError, SinkError
from engine.lifecycle import RankExit, RankState
from engine.model.attention import resolve_backend
from engine.model.loader import build_generator
from engine.plan import V1
from engine.report import RankReport, age_s, rss_bytes
from engine.stage1 import MeshResult, Stage1
from engine.timeline import Timeline
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import prepare, prepare_control
from engine.wire.header import Action, Limits
from engine.wire.meta import error_meta

if TYPE_CHECKING:
    from engine.materials import Materials
    from engine.sinks.base import SinkSet


class Worker:
    """One rank: its configuration, groups, generator, link and, where the plan says so, parts of Stage 0."""

    def __init__(self, config: EngineConfig, env: RankEnv, run_dir: Path, report: RankReport) -> None:
        self.config = config
        self.env = env
        self.run_dir = run_dir
        self.report = report
        self.topology = Topology.of(config)
        self.timeline = read_timeline(config)
        self.device = effective_device(config)
        if self.device == "cuda":
            torch.cuda.set_device(env.local_rank)
        self.blackbox = BlackBox(run_dir / "ranks" / f"rank{env.rank}.blackbox", env.rank)

    def run(self) -> None:
        """Start-up, the stream, the end. Raises whatever ends this rank early."""
        report, comm = self.report, self.config.comm
        self.topology.require_world(self.env)
        report.mesh_rank = self.topology.mesh_rank(self.env.rank)
        report.role = self.topology.role(self.env.rank)
        report.tp_plan = self.config.plan.tp_plan
        report.move(RankState.JOINING)
        meeting = MeetingPoint(self.env, comm.join_timeout_s)
        meeting.meet("join", comm.join_timeout_s)
        groups = create_groups(self.env, self.config, self.topology, meeting)
        parity.check(groups.world, parity.launch_observation(self.config), "configuration, versions or environment")
        report.times["join_s"] = age_s()

        report.move(RankState.LOADING)
        stage1 = self._load_generator(groups)
        materials = self._load_materials()
        report.times["loaded_s"] = age_s()  # this rank alone; ready_s waits for the slowest
        meeting.meet("load", self.config.liveness.load_budget_s)
        shapes = parity.shape_observation(self.config, groups.mesh.size, report.effective)
        replicated = {"weights.replicated": str(report.generator["replicated_fingerprint"])}
        parity.check(groups.world, shapes | replicated, "shapes, effective backends or weights")
        report.times["load_s"] = age_s()

        report.move(RankState.WARMING)
        report.generator["collectives_per_call"] = stage1.warm_up()
        groups.gate.phase = Phase.LINK
        report.times["ready_s"] = age_s()
        report.memory["rss_ready_bytes"] = rss_bytes()
        report.move(RankState.RUNNING)
        report.write()

        link = self._link(groups)
        if self.env.rank == 0:
            if materials is None:
                raise EngineError("rank 0 always holds Stage 0's parts", exit_code=int(RankExit.BAD_CONFIG))
            lead(self, link, stage1, materials)
        else:
            follow(self, link, stage1, materials)
        report.move(RankState.SHUTDOWN)

    def warn(self, text: str) -> None:
        """Once in the report, once on stderr."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)
            print(f"rank {self.env.rank}: warning: {text}", file=sys.stderr, flush=True)

    def _load_generator(self, groups: Groups) -> Stage1:
        backend, reason = resolve_backend(self.config.model.attention_backend, self.device, self.config.model.dtype)
        self.report.effective = {
            "attention_backend": backend,
            "attention_reason": reason,
            "device": self.device,
            "dtype": self.config.model.dtype,
            "comm_backend": effective_comm_backend(self.config),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }
        generator = build_generator(self.config, groups.mesh, backend, self.device)
        self.report.generator = {
            "weights_fingerprint": generator.weights.fingerprint,
            "replicated_fingerprint": generator.replicated_fingerprint,
            "shard_bytes": generator.weights.shard_bytes,
            "kv_cache_bytes": generator.kv.nbytes + generator.cross.nbytes,
        }
        return Stage1(generator.dit, generator.kv, generator.cross, groups.mesh, self.config, self.blackbox)

    def _load_materials(self) -> Materials | None:
        """Stage 0's parts of this rank. A generator-only worker gets none, and never imports the codecs."""
        if self.config.plan.tp_plan == V1 and self.env.rank != 0:
            return None
        from engine.materials import PARTS, RANK0, Materials

        parts = RANK0 if self.env.rank == 0 else PARTS[self.config.plan.tp_plan]
        return Materials(self.config, parts, self.device, self.warn)

    def _link(self, groups: Groups) -> BroadcastLink:
        comm = self.config.comm
        limits = Limits(comm.max_meta_bytes, comm.max_tensors, comm.max_payload_bytes)
        return BroadcastLink(
            groups.mesh, limits, Shapes.of(self.config), self.config.plan.tp_plan, self.device, self.blackbox
        )


def read_timeline(config: EngineConfig) -> Timeline:
    """The source of the run: the file of `run.timeline`, or `run.prompt` for all of it."""
    return Timeline.load(Path(config.run.timeline)) if config.run.timeline else Timeline.of_prompt(config.run.prompt)


def lead(worker: Worker, link: BroadcastLink, stage1: Stage1, materials: Materials) -> None:
    """Rank 0: phases A, B and C of every chunk, then SHUTDOWN. Peers are never left waiting for a header."""
    from engine.recorder import Recorder
    from engine.sinks.base import open_sinks
    from engine.stage0 import Stage0

    config = worker.config
    run = config.run
    sinks: SinkSet | None = None
    recorder = Recorder(worker.run_dir, run.record_latents)
    account = worker.report.account = {"accepted": 0, "emitted": 0, "dropped": 0, "abandoned": 0}
    peers_wait = True  # for a header: so this rank may still end them in good order
    try:
        directory = Path(config.sink.directory) if config.sink.directory else worker.run_dir
        sinks = open_sinks(config.sink, directory, height=config.geometry.height, width=config.geometry.width)
        stage0 = Stage0(config, worker.timeline, materials)
        clock = Clock()
        for _ in range(run.chunks):
            account["accepted"] += 1
            envelope = stage0.step()
            clock.mark("t_a_ms")
            call_id = link.next_call_id()
            frame = prepare(
                stage0.for_link(envelope),
                call_id=call_id,
                link=link.state,
                shapes=link.shapes,
                limits=link.limits,
                buffer=link.buffer,
            )
            peers_wait = False
            link.send(frame)
            clock.mark("t_frame_ms")
            result = stage1.step(envelope, call_id)
            peers_wait = True
            clock.mark("t_b_ms")
            pixels_THWC = stage0.accept(result.latents_out_BFCHW, envelope.plan)
            sinks.write(pixels_THWC.numpy(), envelope.plan.chunk_index, envelope.prompt or "")
            account["emitted"] += 1
            recorder.keep(envelope.plan.chunk_index, result.latents_out_BFCHW, pixels_THWC)
            clock.mark("t_c_ms")
            worker.report.chunks.append(chunk_record(envelope, call_id, result, clock.turn()))
        worker.report.move(RankState.DRAINING)
        worker.report.outputs = {kind: str(path) for kind, path in sinks.close().items()}
        sinks = None
        recorder.close()
        peers_wait = False
        link.send(prepare_control(Action.SHUTDOWN, call_id=link.next_call_id(), link=link.state))
    except BaseException as error:
        account["abandoned"] = account["accepted"] - account["emitted"] - account["dropped"]
        if sinks is not None:
            sinks.abort()
        if peers_wait:
            dismiss(link, error)
        raise


def dismiss(link: BroadcastLink, error: BaseException) -> None:
    """Peers wait for a header: send them one. A refusal by `prepare` or a sink is ours alone, so they drain."""
    action = Action.SHUTDOWN if isinstance(error, PreflightError | SinkError) else Action.ERROR
    meta = error_meta(error) if action is Action.ERROR else None
    try:
        link.send(prepare_control(action, call_id=link.next_call_id(), link=link.state, meta=meta))
    except EngineError as second:
        # The first error is the one to report; that the farewell failed too is worth a line.
        print(f"rank 0: could not say {action.name} to the mesh: {second}", file=sys.stderr, flush=True)


def follow(worker: Worker, link: BroadcastLink, stage1: Stage1, materials: Materials | None) -> None:
    """Every other mesh rank: receive, complete what the plan leaves to it, phase B, until SHUTDOWN."""
    clock = Clock()
    while True:
        received = link.receive()
        if received.header.action is Action.SHUTDOWN:
            worker.report.move(RankState.DRAINING)
            return
        if received.envelope is None:
            continue  # NOOP: the leader is alive
        clock.mark("t_frame_ms")
        envelope = received.envelope if materials is None else materials.complete(received.envelope)
        clock.mark("t_a_ms")
        result = stage1.step(envelope, received.header.call_id)
        clock.mark("t_b_ms")
        if materials is not None and materials.parts.vae_decoder:
            materials.decode(result.latents_out_BFCHW)
        clock.mark("t_c_ms")
        worker.report.chunks.append(chunk_record(envelope, received.header.call_id, result, clock.turn()))


def chunk_record(envelope: Envelope, call_id: int, result: MeshResult, times: dict[str, float]) -> dict[str, Any]:
    plan = envelope.plan
    return {
        "chunk_index": plan.chunk_index,
        "call_id": call_id,
        "cache_epoch": plan.cache_epoch,
        "control_epoch": plan.control_epoch,
        "current_start_frame": plan.current_start_frame,
        "start_frame": result.start_frame,
        "do_kv_recompute": plan.do_kv_recompute,
        "num_denoise_steps": plan.num_denoise_steps,
        "kv_cache_attention_bias": plan.kv_cache_attention_bias,
        "init_cache": plan.init_cache,
        "reset_crossattn_cache": plan.reset_crossattn_cache,
        "expected_generator_calls": plan.expected_calls,
        "observed_generator_calls": result.observed_generator_calls,
        "input_digest_i64": result.input_digest_i64,
        "output_digest_i64": result.output_digest_i64,
        **times,
        "t_b_ms": result.t_b_ms,
    }


class Clock:
    """Times of one chunk in milliseconds: `mark` a stage's end, `turn` at the chunk's."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._times: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self._times[name] = (now - self._last) * 1e3
        self._last = now

    def turn(self) -> dict[str, float]:
        times = self._times | {"period_ms": (self._last - self._start) * 1e3}
        self._start, self._times = self._last, {}
        return times


def main(argv: list[str] | None = None) -> int:
    """Run this process' rank and return its exit code (contract, section 9)."""
    parser = argparse.ArgumentParser(prog="engine.worker", description="One rank of the engine; started by torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        env = RankEnv.from_environ(os.environ)
        config = configuration.load([("run", arguments.config)]).config
    except EngineError as error:
        print(f"{error.code}: {error.message}\nnext: {error.next_step}", file=sys.stderr)
        return error.exit_code
    ranks = arguments.run_dir / "ranks"
    ranks.mkdir(mode=0o700, parents=True, exist_ok=True)
    report = RankReport(ranks / f"rank{env.rank}.json", env.rank)
    report.times["import_s"] = age_s()
    return guard(lambda: Worker(config, env, arguments.run_dir, report).run(), report)


def guard(run: Callable[[], None], report: RankReport) -> int:
    """Run; whatever ends the rank is written down before it leaves, with one sentence on stderr."""
    try:
        run()
    except EngineError as error:
        report.error, report.exit_code = error.to_record(), error.exit_code
        print(f"rank {report.rank}: {error.code} {error.fm or ''}: {error.message}", file=sys.stderr)
        print(f"next: {error.next_step}", file=sys.stderr, flush=True)
    except Exception as error:  # noqa: BLE001 - the boundary: a bug is recorded like any other cause of death
        wrapped = CommError(str(error)) if isinstance(error, torch.distributed.DistError) else EngineError(repr(error))
        report.error, report.exit_code = wrapped.to_record(), wrapped.exit_code
        traceback.print_exc()
    else:
        report.exit_code = int(RankExit.DRAINED)
        report.move(RankState.EXITED)
    if report.exit_code:
        report.move(RankState.ABORTED)
    report.write()
    return report.exit_code or 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave at once: the backend's destructors may wait for peers that are gone.
    os._exit(code)
