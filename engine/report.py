"""What a rank tells the world about itself: one JSON file, replaced atomically, at ready, at the end and at death."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.lifecycle import RankState, can_move
from engine.process import start_ticks

SCHEMA, SCHEMA_VERSION = "tpctl.rank-report", 1
# A stream without an end must not fill the memory: the report keeps its last chunks, the chunk records keep all.
KEPT_CHUNKS = 20_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def read_clock() -> dict[str, float]:
    """Now, on each clock that a rank's times are told in."""
    return {"monotonic_ns": time.monotonic_ns(), "unix_ns": time.time_ns(), "age_s": age_s()}


def age_s() -> float:
    """Seconds since this process was started, imports included; a wall clock that is set does not move it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


@dataclass
class RankReport:
    """Fields of `RUN/ranks/rank{r}.json`. Times in seconds since the process started, sizes in bytes.

    `clock` anchors them: one moment on this host's monotonic clock, on the wall's, and as the age of the process; in
    pp also `loop_ns`, when rank 0's loop began, which its chunks' times count from.
    """

    path: Path
    rank: int
    mesh_rank: int = -1
    role: str = "unknown"
    tp_plan: str = "unknown"
    state: RankState = RankState.STARTING
    exit_code: int | None = None
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    effective: dict[str, str] = field(default_factory=dict)
    parity: dict[str, str] = field(default_factory=dict)  # what the start-up handshake compared
    times: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    account: dict[str, int] | None = None
    drops: dict[str, int] | None = None  # the dropped ones of the account, by reason
    abandoned_chunks: list[int] | None = None
    sinks: dict[str, Any] | None = None  # how slow they were
    outputs: dict[str, str] | None = None
    clock: dict[str, float] = field(default_factory=read_clock)
    on_move: Callable[[RankState], None] | None = None  # hears of each state as it is reached

    def move(self, state: RankState) -> None:
        """Take a legal transition; stamps the time of reaching each state."""
        if not can_move(self.state, state):
            raise EngineError(f"rank {self.rank} cannot go from {self.state} to {state}", exit_code=70)
        self.state = state
        if self.on_move is not None:
            self.on_move(state)
        self.times[f"{state.value}_s"] = age_s()

    def keep(self, chunk: dict[str, Any]) -> None:
        """One more chunk; of a very long stream the oldest ones go."""
        self.chunks.append(chunk)
        if len(self.chunks) > KEPT_CHUNKS:
            del self.chunks[: KEPT_CHUNKS // 10]

    def write(self) -> None:
        data = {item.name: getattr(self, item.name) for item in fields(self)} | {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "memory": self.memory | {"peak_rss_bytes": peak_rss_bytes()},
            "imported": {name: name in sys.modules for name in ("transformers", "diffusers")},
        }
        del data["path"], data["on_move"]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        temporary.replace(self.path)


def ended_with(path: Path, pid: int) -> int | None:
    """The exit code that this process wrote into its report; None: it did not end, or without a word."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    code = report.get("exit_code") if isinstance(report, dict) and report.get("pid") == pid else None
    return code if isinstance(code, int) else None


def peak_rss_bytes() -> int:
    """This process' own peak. `ru_maxrss` would not do: it survives `exec`, so a child starts with its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return rss_bytes()


def rss_bytes() -> int:
    """What this process holds now. Cheap: it is asked for every chunk."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE_BYTES
