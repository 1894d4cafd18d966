"""What one rank's loop works with, whichever loop it is."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.blackbox import BlackBox
from engine.config import EngineConfig, RankEnv
from engine.control import Steering
from engine.drain import DrainRequest
from engine.errors import EngineError, TripwireError
from engine.lifecycle import RankExit, RankState
from engine.records import ChunkRecords, Header, StageRecords
from engine.report import RankReport
from engine.stage1 import MeshResult
from engine.timeline import Timeline
from engine.watchdog import Deadline, Watchdog

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
    steering: Steering | None = None

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self._expired)
        self.drain = DrainRequest(self._first_signal, self._second_signal)

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
        self.report.keep(record)
        self.records.append(record, result.global_end_index, result.local_end_index)

    def open_account(self) -> dict[str, int]:
        """On rank 0, once: accepted = emitted + dropped + abandoned, in every ending."""
        self.report.account = {"accepted": 0, "emitted": 0, "dropped": 0, "abandoned": 0}
        return self.report.account

    def count(self, fate: str) -> None:
        """One more chunk accepted, emitted or dropped; in the black box too, which outlives a killed rank."""
        if self.report.account is None:
            raise EngineError("chunks are counted on rank 0, once its account is open", code="TP-6406")
        self.report.account[fate] += 1
        self.blackbox.count(fate)

    def emitted(self, chunk_index: int) -> None:
        """A chunk is out: count it, and tell whoever steered it."""
        self.count("emitted")
        if self.steering is not None:
            self.steering.shown(chunk_index)

    def warn(self, text: str) -> None:
        """Once in the report, once on stderr."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)
            print(f"rank {self.env.rank}: warning: {text}", file=sys.stderr, flush=True)

    def leave_now(self, error: EngineError) -> None:
        """Record and end the process from any thread; nothing of the main thread runs again."""
        self.report.error, self.report.exit_code = error.to_record(), error.exit_code
        self.report.state = RankState.ABORTED
        self.blackbox.commit("leave now", "-", {})
        self.blackbox.enter_state(RankState.ABORTED)
        print(f"rank {self.env.rank}: {error.code}: {error.message}", file=sys.stderr, flush=True)
        self.report.write()
        os._exit(error.exit_code)

    def _expired(self, deadline: Deadline) -> None:
        orphaned = deadline.exit_code is RankExit.ORPHANED
        self.leave_now(
            TripwireError(
                f"rank {self.env.rank} spent more than {deadline.budget_s:g} s in {deadline.name}",
                code="TP-6401" if orphaned else "TP-6402",
                fm=deadline.fm,
                exit_code=int(deadline.exit_code),
                evidence={"waited_in": deadline.name, "budget_s": deadline.budget_s},
                next_step="tpctl triage RUN_DIR",
            )
        )

    def _first_signal(self, name: str) -> None:
        """Drain. Rank 0 leads it; before the stream runs there is nothing to drain, and the rank leaves."""
        if self.report.state not in STREAMING:
            self._abort(name, "before the stream ran")
        elif self.env.rank == 0:
            budget_s = self.config.liveness.drain_deadline_s
            print(f"rank 0: {name}: draining, {budget_s:g} s at most", file=sys.stderr, flush=True)
            self.watchdog.arm("the drain", budget_s, RankExit.PHASE_BUDGET)

    def _second_signal(self, name: str) -> None:
        self._abort(name, "a second time: abort")

    def _abort(self, name: str, when: str) -> None:
        account = self.report.account
        if account is not None:
            account["abandoned"] = account["accepted"] - account["emitted"] - account["dropped"]
        number = 128 + {"SIGTERM": 15, "SIGINT": 2}[name]
        self.leave_now(
            EngineError(f"{name} {when}", code="TP-6403", exit_code=number, next_step="tpctl bringup --level 1")
        )
