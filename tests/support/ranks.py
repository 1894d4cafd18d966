"""Starts real ranks of `engine.worker`, one process each, with the environment that a launcher would give them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from engine.config import EngineConfig

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a job of ranks ended. `exit_codes` by rank; a rank that the deadline cut reads -9."""

    exit_codes: dict[int, int]
    stderr: dict[int, str]
    reports: dict[int, dict[str, Any]]
    run_dir: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    run_dir: Path,
    config: EngineConfig,
    *,
    world_size: int | None = None,
    ranks: list[int] | None = None,
    configs: dict[int, EngineConfig] | None = None,
    environ: dict[int, dict[str, str]] | None = None,
    port: int | None = None,
    deadline_s: float = DEADLINE_S,
) -> Outcome:
    """Run `ranks` (default: all) to their end, or to the deadline. No process outlives this call.

    `configs` and `environ` give single ranks another configuration or other variables.
    """
    world_size = world_size or config.world_size
    port = port or free_port()
    run_dir.mkdir(parents=True, exist_ok=True)
    processes = {}
    try:
        for rank in ranks if ranks is not None else range(world_size):
            path = run_dir / f"config{rank}.toml"
            path.write_text(tomli_w.dumps((configs or {}).get(rank, config).to_dict()))
            command = [sys.executable, "-m", "engine.worker", "--config", str(path), "--run-dir", str(run_dir)]
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            with (run_dir / f"stderr{rank}.log").open("wb") as log:
                processes[rank] = subprocess.Popen(
                    command,
                    env=environment | (environ or {}).get(rank, {}),
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
        end = time.monotonic() + deadline_s
        for process in processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    return Outcome(
        exit_codes={rank: process.returncode for rank, process in processes.items()},
        stderr={rank: (run_dir / f"stderr{rank}.log").read_text(errors="replace") for rank in processes},
        reports={
            rank: json.loads(path.read_text())
            for rank in processes
            if (path := run_dir / "ranks" / f"rank{rank}.json").exists()
        },
        run_dir=run_dir,
    )
