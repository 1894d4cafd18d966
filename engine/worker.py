"""A rank's entry: composes the parts of its role and runs them. The only composer of the engine.

    python -m torch.distributed.run --nproc-per-node=N -m engine.worker --config RUN/config.toml --run-dir RUN

The path of one chunk: `leader.lead` (rank 0) or `follower.follow` (the others) -> `Stage1.step` -> `DiT.forward`.
In pp, `pipeline.Pipeline` (rank 0) -> `meshleader.MeshLeader` -> `Stage1.step`, and back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine import config as configuration
from engine import faults, memory, warmup
from engine.assets import cache_dir
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
from engine.control import ControlSocket, SteeredTimeline, Steering
from engine.drain import Supervisor
from engine.errors import EngineError
from engine.evidence import Evidence
from engine.failures import guard
from engine.faults import Parts
from engine.follower import follow
from engine.lifecycle import RankExit, RankState
from engine.log import Level, Log, log_path
from engine.meshleader import MeshLeader
from engine.model import attention
from engine.model.compiled import keep_kernels_in, resolve_compiler
from engine.model.loader import build_generator
from engine.plan import PP_PLANS, V0, V1, V11A
from engine.rank import RankContext
from engine.report import RankReport, age_s, rss_bytes
from engine.stage1 import Stage1
from engine.timeline import Timeline
from engine.wire.envelope import Shapes
from engine.wire.header import Limits

if TYPE_CHECKING:
    from engine.materials import Materials


class Worker:
    """One rank: its configuration, groups, generator, link and, where the plan says so, parts of Stage 0."""

    def __init__(self, config: EngineConfig, env: RankEnv, run_dir: Path, report: RankReport) -> None:
        self.config = config
        self.env = env
        self.run_dir = run_dir
        self.report = report
        self.topology = Topology.of(config)
        self.device = effective_device(config)
        if self.device == "cuda":
            torch.cuda.set_device(env.local_rank)
        self.blackbox = BlackBox(run_dir / "ranks" / f"rank{env.rank}.blackbox", env.rank)
        self.journal = open_journal(config, env, run_dir, self.blackbox)
        report.on_move = self._moved
        self.context = RankContext(config, env, run_dir, report, read_timeline(config), self.blackbox, self.journal)

    @memory.names_shortage
    def run(self) -> None:
        """Start-up, the stream, the end. Raises whatever ends this rank early."""
        report, comm, live = self.report, self.config.comm, self.config.liveness
        self.topology.require_world(self.env)
        report.mesh_rank = self.topology.mesh_rank(self.env.rank)
        report.role = self.journal.role = self.topology.role(self.env.rank)
        report.tp_plan = self.config.plan.tp_plan
        report.move(RankState.JOINING)
        meeting = MeetingPoint(self.env, self.topology, comm.join_timeout_s)
        meeting.meet("join", comm.join_timeout_s)
        self.context.neighbours = meeting.neighbours("join")
        groups = create_groups(self.env, self.config, self.topology, meeting, self.blackbox)
        faults.before_handshake(self.config, self.env.rank, self.blackbox)
        report.parity = parity.launch_observation(self.config)
        parity.check(groups.world, report.parity, "configuration, versions or environment")
        report.times["join_s"] = age_s()

        report.move(RankState.LOADING)
        report.effective = self._effective()
        stage1 = self._load_generator(groups) if report.mesh_rank >= 0 else None
        materials = self._load_materials()
        report.times["loaded_s"] = age_s()  # this rank alone; ready_s waits for the slowest
        meeting.meet("load", live.load_budget_s)
        # The shape handshake: Stage 0, in pp on a rank of its own, is one of those that must agree.
        shapes = parity.shape_observation(self.config, groups.mesh.size, report.effective)
        if self.topology.pp:
            parity.check(groups.world, shapes, "shapes or effective backends")
        if stage1 is not None:
            replicated = {"weights.replicated": str(report.generator["replicated_fingerprint"])}
            peers = groups.mesh if self.topology.pp else groups.world
            parity.check(peers, shapes | replicated | self._source(materials), "shapes, effective backends or weights")
            stage1.check_baselines()
        report.times["load_s"] = age_s()

        report.move(RankState.WARMING)
        with self.context.watchdog.budget("the warm-up", live.warmup_budget_s, RankExit.PHASE_BUDGET):
            compile_s = warmup.compile_alone(stage1) if stage1 is not None else 0.0
            meeting.meet("compile", live.warmup_budget_s)  # no rank waits in a collective for another one's compiler
            if stage1 is not None:
                report.generator["collectives_per_call"] = warmup.in_lockstep(stage1)
                report.generator |= warmup.facts(stage1, compile_s)
            if self.topology.pp:
                meeting.meet("warm", live.warmup_budget_s)  # rank 0 knows that the mesh is ready
        groups.gate.phase = Phase.LINK
        job = meeting.name_job()
        if stage1 is not None:
            self.context.open_records(job)  # of a mesh rank's cache; Stage 0 alone has none
        if self.config.run.record_frames and stage1 is not None:
            warn = self.context.warn
            stage1.evidence = Evidence.of_rank(self.run_dir, job, self.config, groups.mesh, self.device, warn)
        report.times["ready_s"] = age_s()
        report.memory["rss_ready_bytes"] = rss_bytes()
        report.move(RankState.RUNNING)
        report.write()

        self._serve(groups, stage1, materials)
        report.move(RankState.SHUTDOWN)

    def listen(self, path: Path) -> ControlSocket:
        """On rank 0, once, before `run`: from here on an operator's requests wait for the stream's next chunk."""
        geometry = self.config.geometry
        enough = geometry.window_frames >= geometry.frames_per_chunk + geometry.context_frames
        from engine.metrics import StreamMetrics

        metrics = self.context.metrics = StreamMetrics(self.config, self.report.chunks)
        steering = self.context.steering = Steering(
            enough, self.context.drain.take_back, metrics.text, on_applied=self._applied
        )
        metrics.count_requests(steering.counts)
        self.context.timeline = SteeredTimeline(self.context.timeline, steering)
        return ControlSocket(path, steering)

    def _moved(self, state: RankState) -> None:
        """Every state is known from outside, in the black box, and has its line in the log."""
        self.blackbox.enter_state(state)
        error = self.report.error
        if state is RankState.ABORTED and error is not None:
            self.journal.failed(error)
        self.journal.info("state", f"from now on {state.value}", state=state.value)

    def _applied(self, request: str, changes: list[str], chunk_index: int) -> None:
        """What was asked for is not in the log: a prompt is the operator's, and its receipt tells it."""
        words = f"{', '.join(changes) or 'nothing'} applied at chunk {chunk_index}"
        self.journal.info("control", words, request=request, changes=changes, at_chunk=chunk_index)

    def _serve(self, groups: Groups, stage1: Stage1 | None, materials: Materials | None) -> None:
        """The loop of this rank's role. Stage 0's loops are imported where there is a Stage 0."""
        if stage1 is None:
            if materials is None:
                raise EngineError("rank 0 always holds Stage 0's parts", exit_code=int(RankExit.BAD_CONFIG))
            from engine.pipeline import Pipeline

            pipeline = Pipeline.of(self.context, groups, materials, self.device)
            faults.plant(self.config, self.env.rank, self.blackbox, groups, Parts(None, None, materials, pipeline))
            pipeline.run()
            return
        link = self._link(groups)
        leader = None
        if groups.pp is not None and groups.mesh.is_leader:
            leader = MeshLeader.of(self.context, groups.pp, link, stage1)
        faults.plant(self.config, self.env.rank, self.blackbox, groups, Parts(link, stage1, materials, None, leader))
        if leader is not None:
            leader.run()
        elif materials is not None and self.env.rank == 0:
            from engine.leader import lead

            lead(self.context, link, stage1, materials)
        else:
            follow(self.context, link, stage1, materials)

    def _source(self, materials: Materials | None) -> dict[str, str]:
        """Where every rank reads the source video itself (v0, v1.1a), all must read the same."""
        alone = self.config.plan.tp_plan not in (V0, V11A)
        if alone or materials is None or materials.source_sha256 is None:
            return {}
        return {"source.sha256": materials.source_sha256}

    def _effective(self) -> dict[str, str]:
        """What `auto` became; the same on every rank, whether it holds a generator or not."""
        keep_kernels_in(cache_dir(self.config) / "kernels")
        backend, reason = attention.resolve_backend(
            self.config.model.attention_backend, self.device, self.config.model.dtype
        )
        return {
            "attention_backend": backend,
            "attention_reason": reason,
            "compile": resolve_compiler(self.config.model.compile, self.device),
            "device": self.device,
            "dtype": self.config.model.dtype,
            "comm_backend": effective_comm_backend(self.config),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
            "regime": self.config.regime,
        }

    def _load_generator(self, groups: Groups) -> Stage1:
        backend = self.report.effective["attention_backend"]
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
        if self.config.plan.tp_plan in (V1, *PP_PLANS) and self.env.rank != 0:
            return None
        from engine.materials import PARTS, RANK0, Materials

        parts = RANK0 if self.env.rank == 0 else PARTS[self.config.plan.tp_plan]
        return Materials(self.config, parts, self.device, self.context.warn)

    def _link(self, groups: Groups) -> BroadcastLink:
        comm = self.config.comm
        limits = Limits(comm.max_meta_bytes, comm.max_tensors, comm.max_payload_bytes)
        return BroadcastLink(
            groups.mesh, limits, Shapes.of(self.config), self.config.plan.tp_plan, self.device, self.blackbox
        )


def open_journal(config: EngineConfig, env: RankEnv, run_dir: Path, blackbox: BlackBox) -> Log:
    """The rank's log; its lines carry the ids of the last commitment point."""
    how = config.log
    return Log(log_path(run_dir, env.rank), env.rank, lambda: blackbox.ids, Level(how.level), how.max_bytes, how.keep)


def read_timeline(config: EngineConfig) -> Timeline:
    """The source of the run: the file of `run.timeline`, or `run.prompt` for all of it."""
    return Timeline.load(Path(config.run.timeline)) if config.run.timeline else Timeline.of_prompt(config.run.prompt)


def main(argv: list[str] | None = None) -> int:
    """Run this process' rank and return its exit code (contract, section 9)."""
    parser = argparse.ArgumentParser(prog="engine.worker", description="One rank of the engine; started by torchrun.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--control", type=Path, help="where rank 0 listens for its operator")
    parser.add_argument("--supervisor", metavar="PID:TICKS", help="a process without which the job drains itself")
    arguments = parser.parse_args(argv)
    try:
        env = RankEnv.from_environ(os.environ)
        supervisor = Supervisor.parse(arguments.supervisor) if arguments.supervisor else None
        config = faults.differ(configuration.load([("run", arguments.config)]).config, env.rank)
    except EngineError as error:
        print(f"{error.code}: {error.message}\nnext: {error.next_step}", file=sys.stderr)
        return error.exit_code
    ranks = arguments.run_dir / "ranks"
    ranks.mkdir(mode=0o700, parents=True, exist_ok=True)
    report = RankReport(ranks / f"rank{env.rank}.json", env.rank)
    report.times["import_s"] = age_s()

    def run() -> None:
        worker = Worker(config, env, arguments.run_dir, report)
        if supervisor is not None and env.rank == 0:
            supervisor.watch()  # the drain signals have their handlers now
        if arguments.control is None or env.rank != 0:
            worker.run()
            return
        with contextlib.closing(worker.listen(arguments.control)):
            worker.run()

    return guard(run, report)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave at once: the backend's destructors may wait for peers that are gone.
    os._exit(code)
