"""What the ranks of a launch to come would see, asked of short processes in their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from tpctl import snapshot
from tpctl.launch.environment import rank_environment

TIMEOUT_S = 30.0


def probe(config: EngineConfig) -> dict[str, dict[str, Any]]:
    """Start one short process for each rank, in the environment its rank would have; what each sees, by rank.

    A probe that fails or does not answer in time is left out: the caller's coverage then says so.
    """
    import tomli_w

    with tempfile.TemporaryDirectory(prefix="tpctl-parity-") as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "tpctl.snapshot", str(path)]
        tables: dict[str, dict[str, Any]] = {}
        # As many at once as there are cores, twice: a probe waits as much as it works.
        with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as probes:
            answers = probes.map(lambda rank: _ask(command, rank), range(config.world_size))
            for rank, table in enumerate(answers):
                if table is not None:
                    tables[f"rank{rank}"] = table
    return tables


def _ask(command: list[str], rank: int) -> dict[str, Any] | None:
    environ = rank_environment() | {"RANK": str(rank)}
    try:
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
        data = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, OSError, ValueError):
        return None
    return comparable(snapshot.flatten(data)) if isinstance(data, dict) else None


def comparable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the launcher sets for ranks on purpose, and without variables that became configuration."""
    return {key: value for key, value in table.items() if not key.startswith(("environment.", "threads."))}
