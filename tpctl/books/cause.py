"""The failures that pages are rehearsed against: caused by drills, or by what no drill does, and what they left."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, from_dict
from engine.plan import PP0
from engine.referee.parent import named
from tpctl.books.execute import execute
from tpctl.drill import table
from tpctl.errors import CliError
from tpctl.launch import local
from tpctl.launch.environment import rank_environment

# Not a drill: one rank of two is started, and the other never comes.
ALONE = "alone"
JOIN_S, DEADLINE_S = 2.0, 60.0
# Faults that no job dies of, for a job that ends well and is slow: what its configuration says besides.
SLOW: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "O-02": {
        "plan": {"tp_plan": PP0},
        "schedule": {"recompute": False},
        "run": {"chunks": 12},
        "drill": {"id": "O-02", "victim_rank": 0, "at_chunk": 1},
    },
    "SLOW-RANK": {
        "plan": {"tp": 2},
        "geometry": {"height": 32, "width": 32},
        "run": {"chunks": 10},
        "drill": {"id": "SLOW-RANK", "victim_rank": 1, "at_chunk": 1},
    },
}


@dataclass(frozen=True)
class Causes:
    """`ready` may hold run directories of drills that ran before; `root` gets the others."""

    root: Path
    ready: Path | None = None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Drills that have to be run."""
        drills = {drill.id for drill in table.load()}
        return sorted(name for name in set(names) if name in drills and self._ready(name) is None)

    def run_dir(self, name: str) -> Path | None:
        """What the failure left; None where it could not be caused here."""
        found = self._ready(name) or self.root / name
        if not (found / "ranks").is_dir():
            return None
        return self._one_host(found) if (found / "host0").is_dir() else found

    def _ready(self, name: str) -> Path | None:
        found = self.ready / name if self.ready is not None else None
        return found if found is not None and (found / "ranks").is_dir() else None

    def _one_host(self, found: Path) -> Path:
        """Of a job over two hosts, what the first one has on its disk."""
        view = self.root / f"{found.name}-host0"
        if not view.exists():
            (view / "ranks").mkdir(parents=True)
            for path in [*(found / "ranks").glob("rank0.*"), *(found / "ranks").glob("rank0*.jsonl")]:
                shutil.copy(path, view / "ranks")
            for path in [found / "config.toml", *(found / "host0").glob("referee.*")]:
                shutil.copy(path, view)
        return view

    def slow(self, name: str, base: EngineConfig) -> Path:
        """Run a job to its end whose stream is slow as `name` says. Returns its run directory."""
        directory = self.root / name
        directory.mkdir(parents=True)
        data = {"model": base.to_dict()["model"], "sink": {"kinds": ["null"]}, **SLOW[name]}
        config = from_dict(data)
        path = self._write(config, directory)
        outcome = local.run(
            local.LaunchSpec(
                nproc=config.world_size,
                run_dir=directory,
                arguments=("--config", str(path), "--run-dir", str(directory), "--supervisor", named(os.getpid())),
                deadline_s=DEADLINE_S,
            ),
            lambda _: None,
        )
        if outcome.returncode:
            raise CliError(f"a job that is only slow did not end well: {directory}", code="TP-8116")
        return directory

    def _write(self, config: EngineConfig, directory: Path) -> Path:
        import tomli_w

        path = directory / "config.toml"
        path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        return path

    def alone(self, base: EngineConfig) -> Path:
        """Start rank 0 of two, and see it give up. Returns its run directory."""
        directory = self.root / ALONE
        directory.mkdir(parents=True)
        config = from_dict({"model": base.to_dict()["model"], "plan": {"tp": 2}, "comm": {"join_timeout_s": JOIN_S}})
        path = self._write(config, directory)
        argv = [sys.executable, "-m", "engine.worker", "--config", str(path), "--run-dir", str(directory)]
        lonely = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        ran = execute(argv, DEADLINE_S, {**rank_environment(), **lonely}, None)
        (directory / "stderr0.log").write_text(ran.stderr, encoding="utf-8")
        if ran.late or ran.code == 0:
            raise CliError(f"a rank that waits for another one in vain did not give up: {directory}", code="TP-8114")
        return directory
