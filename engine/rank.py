"""What one rank's loop works with, whichever loop it is."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import memory
from engine.blackbox import BlackBox
from engine.comm.neighbours import Neighbours
from engine.config import EngineConfig, RankEnv
from engine.control import Steering
from engine.drain import DrainRequest
from engine.errors import EngineError, TripwireError
from engine.lifecycle import Doing, RankExit, RankState
from engine.log import Log
from engine.records import ChunkRecords, Header, StageRecords
from engine.report import RankReport, age_s, ended_with
from engine.sinks.base import open_sinks
from engine.sinks.writer import STUCK_S, SinkWriter
from engine.stage1 import MeshResult
from engine.timeline import Timeline
from engine.watchdog import Deadline, Watchdog

if TYPE_CHECKING:  # its library is loaded where somebody listens
    from engine.metrics import StreamMetrics

# The longest that a paused loop does not look at its peers.
REST_S = 0.2
THE_DRAIN = "the drain"
STREAMING = (RankState.RUNNING, RankState.DRAINING, RankState.SHUTDOWN)


@dataclass
class RankContext:
    """Identity, configuration, and the ways to end. Made once, by the worker."""

    config: EngineConfig
    env: RankEnv
    run_dir: Path
    report: RankReport
    timeline: Timeline
    blackbox: BlackBox
    journal: Log
    steering: Steering | None = None
    metrics: StreamMetrics | None = None
    neighbours: Neighbours = field(default_factory=Neighbours)

    def __post_init__(self) -> None:
        self._counting = threading.Lock()  # the loop and the sink writer both count
        self._settled = False
        self._failure: EngineError | None = None
        self.writer: SinkWriter | None = None
        self.watchdog = Watchdog(self._expired)
        self.drain = DrainRequest(self._first_signal, self._second_signal, self._drain_taken_back)

    def open_records(self, job: str) -> None:
        """Once, when the job has its name; a rank that ends earlier made no chunk."""
        path = self.run_dir / "ranks" / f"rank{self.env.rank}.chunks.jsonl"
        header = Header(job, self.env.rank, self.env.world_size, self.config.dims.num_layers)
        self.records = ChunkRecords(path, header, self.warn)

    def open_stages(self, loop_ns: int) -> StageRecords:
        """On rank 0 of a pp plan, once: the times of its stages, chunk by chunk, counted from `loop_ns`."""
        path = self.run_dir / "ranks" / f"rank{self.env.rank}.stages.jsonl"
        return StageRecords(path, self.env.rank, loop_ns, self.warn)

    def keep(self, record: dict[str, Any], result: MeshResult) -> None:
        """One chunk, for the report and for the chunk records."""
        self.keep_record(record)
        made = result.graphs - self.report.generator["graphs"]
        if made:
            self.report.generator["graphs"] = result.graphs
            self.report.generator["graphs_in_stream"] = self.report.generator.get("graphs_in_stream", 0) + made
            self.warn(f"chunk {record['chunk_index']} had {made} graphs compiled that the warm-up had not: it was slow")
        self.records.append(record, result.global_end_index, result.local_end_index)

    def keep_record(self, record: dict[str, Any]) -> None:
        """One chunk, for the report, the log and, on rank 0, the metrics; there with its wait for the sinks."""
        if self.writer is not None:
            record["t_sink_ms"] = self.writer.waited_ms()
        self.report.keep(record)
        self._log_chunk(record)
        if self.metrics is not None:
            self.metrics.chunk(record)

    def doing(self, doing: Doing) -> None:
        """What the loop is at from now on: on rank 0 the thing that the mesh waits for."""
        self.blackbox.enter_doing(doing)

    def goes_on(self, chunk_index: int, well: Callable[[], bool], resumed: Callable[[], object]) -> bool:
        """Whether to make this chunk, or to drain. Waits while the operator holds the stream before it.

        Args:
            well: asked while it waits; False ends the wait, for the caller to find out why.
            resumed: called when a pause is over.
        """
        while not self.drain.begin():
            steering = self.steering
            if steering is None or not steering.holds(chunk_index):
                return True
            self.doing(Doing.PAUSED)
            self.journal.info("pause", f"held before chunk {chunk_index}")
            while steering.holds(chunk_index) and not self.drain.requested:
                if not well():
                    return True
                steering.wait(REST_S)
            self.blackbox.resume()
            self.journal.info("resume", f"the stream goes on with chunk {chunk_index}")
            resumed()
        return False

    def dropped(self, reason: str, counted: bool = True) -> None:
        """A result that is not emitted; `counted` unless its chunk has another fate."""
        if counted:
            self.count("dropped", reason)
        if self.metrics is not None:
            self.metrics.dropped(reason)

    def _log_chunk(self, record: dict[str, Any]) -> None:
        """A chunk is done here. Written at level debug alone."""
        times = {name: round(record[name], 3) for name in ("period_ms", "t_b_ms") if record.get(name) is not None}
        self.journal.debug("chunk", f"chunk {record['chunk_index']} is done", ids=record, **times)

    def open_account(self) -> None:
        """On rank 0, once: accepted = emitted + dropped + abandoned, in every ending."""
        self.report.account = {"accepted": 0, "emitted": 0, "dropped": 0, "abandoned": 0}
        self.report.drops = {"stale": 0, "slow_sink": 0}

    def open_writer(self) -> SinkWriter:
        """On rank 0, once: the sinks, and the thread that writes them. Raises SinkError."""
        config, geometry = self.config, self.config.geometry
        directory = Path(config.sink.directory) if config.sink.directory else self.run_dir
        self.writer = SinkWriter(
            open_sinks(config.sink, directory, height=geometry.height, width=geometry.width),
            config.sink,
            written=self.emitted,
            dropped=lambda chunk_index: self.dropped("slow_sink"),
            failed=self.fail_after_drain,
            stuck=lambda sink: self.blackbox.commit(f"sink {sink}", "-", {}),
        )
        return self.writer

    def count(self, fate: str, reason: str | None = None) -> None:
        """One more chunk accepted, emitted or dropped (why); in the black box too, which outlives a killed rank."""
        if self.report.account is None or self.report.drops is None:
            raise EngineError("chunks are counted on rank 0, once its account is open", code="TP-6406")
        with self._counting:
            if self._settled:
                return
            self.report.account[fate] += 1
            if reason is not None:
                self.report.drops[reason] += 1
            self.blackbox.count(fate)

    def settle(self) -> None:
        """What has no fate by now is abandoned; nothing is counted any more."""
        lost = self.writer.freeze() if self.writer is not None else []
        # Whoever holds the lock only counts; a thread that cannot count must not keep the rank from leaving.
        held = self._counting.acquire(timeout=1.0)
        account = self.report.account
        if account is not None and not self._settled:
            account["abandoned"] = account["accepted"] - account["emitted"] - account["dropped"]
            newest = range(account["accepted"] - account["abandoned"] + len(lost), account["accepted"])
            self.report.abandoned_chunks = [*lost, *newest]  # finished ones, then those in flight
        self._settled = True
        if self.writer is not None:
            self.report.sinks = self.writer.facts()
        if held:
            self._counting.release()

    def ending(self) -> bool:
        """Whether to accept no more: a drain was asked for, or the stream failed in a way that drains first."""
        return self.drain.requested or self._failure is not None

    def fail_after_drain(self, error: EngineError) -> None:
        """The stream cannot go on, but what was accepted can be finished: within the drain's deadline."""
        if self._failure is None:
            self._failure = error
            self.drain.begin(ended=True)  # nobody takes this one back
            self._start_drain(f"{error.code}: {error.message}")

    def raise_failure(self) -> None:
        """After the drain: what it was for, if it was a failure."""
        if self._failure is not None:
            raise self._failure

    def emitted(self, chunk_index: int) -> None:
        """A chunk is out: count it, and tell whoever steered it."""
        self.count("emitted")
        if self.steering is not None:
            self.steering.shown(chunk_index)

    def warn(self, text: str) -> None:
        """Once in the report, once on stderr."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)
            self.journal.warning("warning", text)
            print(f"rank {self.env.rank}: warning: {text}", file=sys.stderr, flush=True)

    def named(self, error: BaseException) -> BaseException:
        """What this rank died of, where an allocator's refusal needs to be told as such."""
        return memory.named(error, self.env.rank, self.blackbox.ids)

    def leave_now(self, error: EngineError) -> None:
        """Record and end the process from any thread; nothing of the main thread runs again."""
        blocker = self.writer.blocker(STUCK_S) if self.writer is not None else None
        if blocker is not None:
            error.evidence["blocked_by"] = blocker
        self.settle()
        self.report.error, self.report.exit_code = error.to_record(), error.exit_code
        self.report.state = RankState.ABORTED
        self.report.times["aborted_s"] = age_s()
        self.blackbox.commit("leave now", "-", {})
        self.blackbox.enter_state(RankState.ABORTED)
        self.journal.failed(error.to_record())
        print(f"rank {self.env.rank}: {error.code}: {error.message}", file=sys.stderr, flush=True)
        self.report.write()
        os._exit(error.exit_code)

    def _expired(self, deadline: Deadline) -> None:
        orphaned = deadline.exit_code is RankExit.ORPHANED
        blocker = self.writer.blocker() if self.writer is not None and deadline.name == THE_DRAIN else None
        gone, stopped, left = self._peers()
        said = [
            *(f"rank {rank} is gone" for rank in gone),
            *(f"rank {rank} is stopped" for rank in stopped),
            *(f"rank {rank} left with {code}" for rank, code in left.items()),
        ]
        self.leave_now(
            TripwireError(
                f"rank {self.env.rank} spent more than {deadline.budget_s:g} s in {deadline.name}"
                + "".join(f"; {what}" for what in [*said, blocker] if what),
                code="TP-6401" if orphaned else "TP-6402",
                fm="FM-40" if deadline.fm and gone else deadline.fm,
                exit_code=int(deadline.exit_code),
                evidence={"waited_in": deadline.name, "budget_s": deadline.budget_s, "gone": gone, "stopped": stopped},
                next_step="tpctl triage RUN_DIR",
            )
        )

    def _peers(self) -> tuple[list[int], list[int], dict[int, int]]:
        """Neighbours that are gone without a word, that are stopped, and that left by an exit code of their own.

        Only the first prove that a peer was lost: one may have left because it waited too, and gave up a hair sooner.
        """
        ended = {
            rank: ended_with(self.run_dir / "ranks" / f"rank{rank}.json", self.neighbours.processes[rank].pid)
            for rank in self.neighbours.gone()
        }
        left = {rank: code for rank, code in ended.items() if code is not None}
        return [rank for rank in ended if rank not in left], self.neighbours.stopped(), left

    def _first_signal(self, name: str) -> None:
        """Drain. Rank 0 leads it; before the stream runs there is nothing to drain, and the rank leaves."""
        self.journal.info("signal", f"{name}: the first, which means drain", signal=name)
        if self.report.state not in STREAMING:
            self._abort(name, "before the stream ran")
        elif self.env.rank == 0:
            self._start_drain(name)

    def _start_drain(self, why: str) -> None:
        budget_s = self.config.liveness.drain_deadline_s
        print(f"rank 0: {why}: draining, {budget_s:g} s at most", file=sys.stderr, flush=True)
        self.watchdog.arm(THE_DRAIN, budget_s, RankExit.PHASE_BUDGET)
        if self.steering is not None:
            self.steering.wake()

    def _drain_taken_back(self) -> None:
        self.watchdog.disarm(THE_DRAIN)
        self.journal.info("signal", "the drain is taken back: the stream goes on")
        print("rank 0: the drain is taken back: the stream goes on", file=sys.stderr, flush=True)

    def _second_signal(self, name: str) -> None:
        self.journal.warning("signal", f"{name}: the second, which means abort", signal=name)
        self._abort(name, "a second time: abort")

    def _abort(self, name: str, when: str) -> None:
        number = 128 + {"SIGTERM": 15, "SIGINT": 2}[name]
        self.leave_now(
            EngineError(f"{name} {when}", code="TP-6403", exit_code=number, next_step="tpctl bringup --level 1")
        )
