"""A rank's log: one JSON object a line in `RUN/ranks/rank{r}.log.jsonl`, with the ids of the frame that it worked on.

The first line of each file is a header: whose log it is, on which host and boot. Every other line is one event:
    {"seq": 7, "ts": "2026-01-31T12:00:00.123456Z", "mono_ns": 123, "level": "info", "rank": 0, "role": "stage0",
     "event": "state", "message": "...", "call_id": 12, "chunk_index": 3, "cache_epoch": 0, "data": {...}}
`seq` counts from 1 over the life of the rank, so a gap shows. A file that would grow beyond `max_bytes` becomes
`rank{r}.log.1.jsonl`, the one before `.2`, and so on; the oldest goes. Logging never harms the job: it is never done
between a header and the end of phase B, a full disk ends the logging and not the rank, and no thread waits for another
one's line for long. Free of torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA, SCHEMA_VERSION = "tpctl.log", 1
IDS = ("call_id", "chunk_index", "cache_epoch")
MAX_MESSAGE = 4096
# A line may wait for another thread's so long. One that gets no turn is lost, and the next one says how many were.
TURN_S = 0.5


class Level(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"

    @property
    def weight(self) -> int:
        return WEIGHTS[self]


WEIGHTS = {level: weight for weight, level in enumerate(Level)}


class Log:
    """The writing side. It raises nothing, and may be called from any thread.

    Args:
        path: of the file in use; older ones stand beside it.
        ids: the ids of the frame in work, for events that give none of their own.
        level: events below it are not written.
        max_bytes, keep: of one file; older files beside it.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        ids: Callable[[], Mapping[str, int]] = dict,
        level: Level = Level.info,
        max_bytes: int = 4 << 20,
        keep: int = 3,
    ) -> None:
        self.role = "unknown"
        self._path = path
        self._rank = rank
        self._ids = ids
        self._least = level.weight
        self._max_bytes = max_bytes
        self._keep = keep
        self._turn = threading.Lock()
        self._seq = 0
        self._lost = 0
        self._size = 0
        self._fd: int | None = None
        for number in range(1, keep + 1):  # of an earlier run in the same place
            with contextlib.suppress(OSError):
                older(path, number).unlink()
        try:
            self._open()
        except OSError as error:
            self._stop(error)

    def debug(self, event: str, message: str, **how: Any) -> None:
        self._say(Level.debug, event, message, **how)

    def info(self, event: str, message: str, **how: Any) -> None:
        self._say(Level.info, event, message, **how)

    def warning(self, event: str, message: str, **how: Any) -> None:
        self._say(Level.warning, event, message, **how)

    def error(self, event: str, message: str, **how: Any) -> None:
        self._say(Level.error, event, message, **how)

    def failed(self, error: Mapping[str, Any]) -> None:
        """What this rank dies of, as its report has it."""
        how = {key: error[key] for key in ("code", "fm", "exit_code", "next")}
        self.error("error", error["message"], ids=error["ids"] or None, **how)

    def _say(self, level: Level, event: str, message: str, ids: Mapping[str, int] | None = None, **data: Any) -> None:
        if level.weight < self._least or self._fd is None:
            return
        known = self._ids() if ids is None else ids
        if not self._turn.acquire(timeout=TURN_S):
            self._lost += 1
            return
        try:
            self._seq += 1
            line = {
                "seq": self._seq,
                "ts": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "mono_ns": time.monotonic_ns(),
                "level": level.value,
                "rank": self._rank,
                "role": self.role,
                "event": event,
                "message": message[:MAX_MESSAGE],
                **{name: known.get(name) for name in IDS},
                "data": data | ({"lost": self._lost} if self._lost else {}),
            }
            self._lost = 0
            self._write((json.dumps(line, separators=(",", ":"), default=str) + "\n").encode())
        except OSError as error:
            self._stop(error)
        finally:
            self._turn.release()

    def _write(self, raw: bytes) -> None:
        if self._size + len(raw) > self._max_bytes and self._size > self._head_bytes:
            self._rotate()
        assert self._fd is not None
        self._size += len(raw)
        while raw:
            raw = raw[os.write(self._fd, raw) :]

    def _rotate(self) -> None:
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None
        for number in range(self._keep, 0, -1):
            source = self._path if number == 1 else older(self._path, number - 1)
            with contextlib.suppress(FileNotFoundError):
                source.replace(older(self._path, number))
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        head = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "after_seq": max(self._seq - 1, 0),  # a file is begun for the event in work
        }
        raw = (json.dumps(head, separators=(",", ":")) + "\n").encode()
        self._size = self._head_bytes = len(raw)
        while raw:
            raw = raw[os.write(self._fd, raw) :]

    def _stop(self, error: OSError) -> None:
        """For good: a log with a gap that nobody sees would be worse than one that ends."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None
        print(f"rank {self._rank}: no log from here on: {self._path.name}: {error.strerror}", file=sys.stderr)


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"rank{rank}.log.jsonl"


def older(path: Path, number: int) -> Path:
    """The file that was in use `number` rotations ago."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{number}.jsonl")
