"""Runs `engine.replay` as a process of its own, within a deadline, and listens to what it says.

The process is tied to this one by a pipe: however this one ends, `kill -9` included, the replay ends too.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.sealed import Kind, SealedError, chunks_in, frame_path, frames_dir, read_sealed
from tpctl.errors import RunError
from tpctl.exitcodes import ExitCode
from tpctl.launch.environment import rank_environment
from tpctl.output import Output

TICK_S = 0.2
REAP_S = 10.0


class EvidenceError(RunError):
    """A run that kept nothing to replay."""

    code = "TP-7511"
    next_step = "tpctl bringup --set run.record_frames=true"
    cli_exit = ExitCode.INCOMPLETE


@dataclass
class Replayed:
    """What a replay told. `problem` is why it ended early, `facts` what it ran with."""

    facts: dict[str, Any] = field(default_factory=dict)
    chunks: dict[int, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    problem: str | None = None
    timed_out: bool = False
    wall_s: float = 0.0


def require_frames(run_dir: Path) -> int:
    """How many chunks were recorded.

    Raises:
        EvidenceError: none, and how to get them.
    """
    recorded = len(chunks_in(frames_dir(run_dir), ".frame"))
    if not recorded:
        raise EvidenceError(
            f"{run_dir} has no recorded frames to replay: run the job with --set run.record_frames=true",
            where=str(run_dir),
        )
    return recorded


def frames_job(run_dir: Path) -> str | None:
    """The job of the first frame that can be read; for runs without records."""
    for chunk_index in chunks_in(frames_dir(run_dir), ".frame"):
        with contextlib.suppress(SealedError):
            return read_sealed(frame_path(run_dir, chunk_index), Kind.FRAME)[0].job
    return None


def config_path(run_dir: Path) -> Path:
    """The configuration that the ranks got.

    Raises:
        EvidenceError: there is none.
    """
    for name in ("config.toml", "config0.toml"):
        if (run_dir / name).is_file():
            return run_dir / name
    raise EvidenceError(
        f"{run_dir} has no config.toml: nobody knows which model to replay with", code="TP-7512", next_step="ls RUN_DIR"
    )


def replay(run_dir: Path, out_dir: Path, job: str | None, deadline_s: float, out: Output) -> Replayed:
    """Replay all recorded frames of a run into `out_dir`; the process is gone when this returns.

    Args:
        job: frames of other jobs are refused; None takes the first frame's.
        deadline_s: seconds for all of it, loading included; 0 is no limit.
    """
    frames = require_frames(run_dir)
    command = [sys.executable, "-m", "engine.replay", "--config", str(config_path(run_dir)), "--run-dir", str(run_dir)]
    command += ["--tied", "--out", str(out_dir), *(["--job", job] if job else [])]
    started = time.monotonic()
    found = Replayed()
    with (
        (out_dir / "stderr.log").open("w+b") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=rank_environment(),
            start_new_session=True,
        ) as process,
        progress(out, frames) as tick,
    ):
        try:
            for line in _lines(process, started + deadline_s if deadline_s else float("inf")):
                _hear(found, line, tick)
            found.timed_out = process.poll() is None and _late(process, started, deadline_s)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(REAP_S)
        found.wall_s = time.monotonic() - started
        if found.timed_out:
            found.problem = f"the replay was ended after {deadline_s:g} s, the deadline"
        elif process.returncode and found.problem is None:
            log.seek(0)
            last = (log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            found.problem = f"the replay died with code {process.returncode}: {last[:300]}"
    return found


def _late(process: subprocess.Popen[bytes], started: float, deadline_s: float) -> bool:
    """Its output has ended, or its time: give it what is left of its time to leave."""
    left_s = started + deadline_s - time.monotonic() if deadline_s else REAP_S
    try:
        process.wait(max(0.0, left_s))
    except subprocess.TimeoutExpired:
        return True
    return False


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """Its output, line by line, until it ends or the deadline passes."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if not selector.select(min(left_s, TICK_S)):
                continue
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            yield from lines


def _hear(found: Replayed, line: bytes, tick: Callable[[str], None]) -> None:
    said = json.loads(line)
    match said["event"]:
        case "start":
            found.facts = {key: value for key, value in said.items() if key not in ("event", "frames")}
        case "chunk":
            found.chunks[said["chunk_index"]] = said
            tick(f"replayed chunk {said['chunk_index']}: {said['calls']} calls in {said['took_s']:.2f} s")
        case "skip":
            found.skipped[said["chunk_index"]] = said["reason"]
            tick(f"chunk {said['chunk_index']} cannot be replayed: {said['reason']}")
        case "error":
            found.problem = f"{said['code']}: {said['message']}"


@contextlib.contextmanager
def progress(out: Output, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines anywhere else; all of it on stderr."""
    if out.quiet or not out.pretty(sys.stderr):
        yield out.say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("loading", total=total)

        def tick(line: str) -> None:
            bar.update(task, advance=1, description=line)

        yield tick
