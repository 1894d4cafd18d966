"""The failures that pages are rehearsed against: caused by drills, or by what no drill does, and what they left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, from_dict
from tpctl.books.execute import Ran, execute
from tpctl.drill.ranks import Nursery, free_port
from tpctl.errors import CliError
from tpctl.launch.environment import rank_environment
from tpctl.matrix.runner import make_assets

# No drills: nobody dies of these, but of the first. One rank of two is started, and the other never comes.
ALONE = "alone"
JOIN_S, DEADLINE_S = 2.0, 60.0
# Envelopes wait for the decode of the chunk before them: the fault that collapses the overlap.
HELD_BACK = "held-back"
# One rank makes each of its calls late: in lockstep all others wait for it.
SLOW_RANK = "slow-rank"
# Somebody reads the frames, and takes this long for each chunk of them: many times what a chunk takes to make.
SLOW_SINK = "slow-sink"
PACE_S = 0.4
# A rank of the mesh holds what only rank 0 should: a worker, and the mesh leader in pp.
FULL_WORKER, FULL_LEADER = "full-worker", "full-leader"
WARM_UP = {"id": "P0-WARM-UP", "victim_rank": 1}
CHUNKS = 10
SIZE = {"height": 16, "width": 16}
CHUNK_BYTES = 12 * SIZE["height"] * SIZE["width"] * 3
# What a pipe takes in that nobody reads, at the least: less than one chunk.
PIPE_BYTES = 4096


@dataclass(frozen=True)
class Causes:
    """`ready` may hold run directories of drills that ran before; `root` gets the others."""

    root: Path
    ready: Path | None = None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those that have to be caused."""
        return sorted(name for name in set(names) if self._ready(name) is None)

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

    def cause(self, names: Iterable[str], base: EngineConfig) -> None:
        """Cause these, which no drill does.

        Raises:
            CliError: it did not come about.
        """
        wanted = set(names)
        self.root.mkdir(exist_ok=True)
        if ALONE in wanted:
            self._alone(base)
        if wanted & (SLOW.keys() | FULL.keys()):
            make_assets(base, self.root / "assets")
        if slow := [name for name in SLOW if name in wanted]:
            with Nursery(self.root / "nursery.log") as nursery:
                for name in slow:
                    SLOW[name](self, nursery, base)
        for name in FULL.keys() & wanted:
            self._full(name, base)

    def _alone(self, base: EngineConfig) -> None:
        """Start rank 0 of two, and see it give up."""
        directory, path = self._configured(ALONE, base, plan={"tp": 2}, comm={"join_timeout_s": JOIN_S})
        ran = _start(directory, path, 0, "0")
        if ran.late or ran.code == 0:
            raise CliError(f"a rank that waits for another one in vain did not give up: {directory}", code="TP-8114")

    def _held_back(self, nursery: Nursery, base: EngineConfig) -> None:
        plan, schedule, sink = {"tp_plan": "pp0", "tp": 1}, {"recompute": False}, {"kinds": ["null"]}
        self._run(HELD_BACK, nursery, base, plan=plan, schedule=schedule, sink=sink, drill={"id": "O-02"})

    def _slow_rank(self, nursery: Nursery, base: EngineConfig) -> None:
        drill = {"id": "SLOW-RANK", "victim_rank": 1, "at_chunk": 1}
        self._run(SLOW_RANK, nursery, base, plan={"tp": 2}, sink={"kinds": ["null"]}, drill=drill)

    def _slow_sink(self, nursery: Nursery, base: EngineConfig) -> None:
        schedule = {"denoising_step_list": [1000]}
        pipe = self.root / SLOW_SINK / "frames.rgb"
        pipe.parent.mkdir()
        os.mkfifo(pipe, stat.S_IRUSR | stat.S_IWUSR)
        sink = {"kinds": ["pipe"], "directory": str(pipe.parent), "queue_chunks": 1}
        with _reading_slowly(pipe):
            self._run(SLOW_SINK, nursery, base, plan={"tp": 2}, schedule=schedule, sink=sink)

    def _full(self, name: str, base: EngineConfig) -> None:
        """In processes of their own: ranks of a nursery have the codecs imported before they are any rank."""
        sink = {"kinds": ["null"]}
        directory, path = self._configured(name, base, plan=FULL[name], run={"chunks": 1}, sink=sink, drill=WARM_UP)
        port = str(free_port())
        with ThreadPoolExecutor() as pool:
            ended = list(pool.map(lambda rank: _start(directory, path, rank, port), (0, 1)))
        self._well(directory, {rank: ran.code for rank, ran in enumerate(ended)})

    def _run(self, name: str, nursery: Nursery, base: EngineConfig, **sections: Mapping[str, Any]) -> None:
        """A job that is slow, or too large, and nothing else: it comes to its end, and all ranks leave with 0."""
        directory, path = self._configured(name, base, geometry=SIZE, run={"chunks": CHUNKS}, **sections)
        ended = nursery.run(directory, path, 2, DEADLINE_S, supervise_s=0.0, referee=False)
        self._well(directory, ended.codes)

    def _well(self, directory: Path, codes: Mapping[int, int]) -> None:
        if set(codes.values()) != {0}:
            raise CliError(f"a job that should come to its end did not end well: {codes}, {directory}", code="TP-8114")

    def _configured(self, name: str, base: EngineConfig, **sections: Mapping[str, Any]) -> tuple[Path, Path]:
        """The directory of a cause, and the configuration in it."""
        import tomli_w

        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        config = from_dict({"model": base.to_dict()["model"], **sections})
        path = directory / "config.toml"
        path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        return directory, path


def _start(directory: Path, config: Path, rank: int, port: str) -> Ran:
    """One rank of two, to its end."""
    argv = [sys.executable, "-m", "engine.worker", "--config", str(config), "--run-dir", str(directory)]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ran = execute(argv, DEADLINE_S, {**rank_environment(), **place, **where}, None)
    (directory / f"stderr{rank}.log").write_text(ran.stderr, encoding="utf-8")
    return ran


@contextlib.contextmanager
def _reading_slowly(pipe: Path) -> Iterator[None]:
    """Somebody reads the pipe, a chunk's bytes in `PACE_S`, until the block is left."""
    over = threading.Event()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    reads = CHUNK_BYTES / PIPE_BYTES  # at the least, for a chunk

    def read() -> None:
        while not over.wait(PACE_S / reads):
            with contextlib.suppress(BlockingIOError):  # nothing there yet
                os.read(reader, PIPE_BYTES)

    thread = threading.Thread(target=read, name="slow-reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.close(reader)


SLOW: Mapping[str, Callable[[Causes, Nursery, EngineConfig], None]] = {
    HELD_BACK: Causes._held_back,
    SLOW_RANK: Causes._slow_rank,
    SLOW_SINK: Causes._slow_sink,
}
FULL: Mapping[str, Mapping[str, Any]] = {
    FULL_WORKER: {"tp": 2},
    FULL_LEADER: {"tp_plan": "pp0", "tp": 1},
}
CAUSED = frozenset({ALONE, *SLOW, *FULL})
