"""`RUN/referee.json`: the verdict, what each rank did, and how long it took."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.referee import words
from engine.referee.judge import Verdict
from engine.referee.snapshot import Snapshot

SCHEMA, SCHEMA_VERSION = "tpctl.referee", 1
NAME = "referee.json"


@dataclass
class Record:
    """Written when the verdict falls, and again when every local rank is gone. Times in milliseconds.

    `told_by` is the host whose verdict this is, None if it is our own; `hosts` the host of each rank that is not here.
    """

    path: Path
    verdict: Verdict
    snapshot: Snapshot
    decided_ns: int
    killed: Sequence[int] = ()
    all_gone_ms: float | None = None
    host: str = field(default_factory=socket.gethostname)
    told_by: str | None = None
    hosts: Mapping[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        verdict, seats = self.verdict, self.snapshot.seats
        entered = {
            rank: entry
            for difference in self.snapshot.differences[:1]
            for rank, entry in difference.entered.items()
            if verdict.kind == "mismatch"
        }
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "host": self.host,
            "told_by": self.told_by,
            "verdict": {
                "kind": verdict.kind.value,
                "fm": verdict.fm,
                "blame": verdict.blame,
                "triggers": list(verdict.triggers),
                "victims": list(verdict.victims),
                "message": verdict.message,
            },
            "ranks": [
                words.seat_record(seat)
                | {"host": self.hosts.get(rank, self.host), "entered": words.entry_record(entered.get(rank))}
                for rank, seat in sorted(seats.items())
            ],
            "unseen": [rank for rank in self.snapshot.expected if rank not in seats],
            "to_find": self.snapshot.to_find,
            "times": {
                "decided_unix": time.time() - (time.monotonic_ns() - self.decided_ns) / 1e9,
                "provable_to_decided_ms": max(0, self.decided_ns - verdict.provable_ns) / 1e6,
                "decided_to_all_gone_ms": self.all_gone_ms,
            },
            "killed": sorted(self.killed),
        }

    def write(self) -> None:
        """Replace the file whole. A full disk must not keep the referee from its work: it says so and goes on."""
        try:
            # Hosts may share the directory.
            temporary = self.path.with_name(f"{self.path.name}.{self.host}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            print(f"referee: cannot write {self.path}: {error.strerror}", file=sys.stderr, flush=True)

    def say(self) -> None:
        fm = f" [{self.verdict.fm}]" if self.verdict.fm else ""
        by = f" (told by {self.told_by})" if self.told_by else ""
        print(f"referee: {self.verdict.kind}{fm}: {self.verdict.message}{by}", file=sys.stderr, flush=True)
