"""What the referee says about a rank, in words and as data."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.blackbox import Collective
from engine.referee.snapshot import Seat


def rank_list(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def call(entry: Collective) -> str:
    return f"{entry.op} {entry.what}"


def ids(entry: Collective) -> str:
    """Nothing outside the stream, where ids are -1."""
    return f" (chunk {entry.chunk_index}, call {entry.call_id})" if entry.call_id >= 0 else ""


def did(rank: int, entry: Collective) -> str:
    return f"rank {rank} {call(entry)} at {entry.site}{ids(entry)}"


def waits(rank: int, entry: Collective) -> str:
    return f"rank {rank} waits in {call(entry)}, number {entry.place} of {entry.group}, at {entry.site}{ids(entry)}"


def was(seat: Seat) -> str:
    """Where a rank is, or was when it died."""
    at = f"rank {seat.rank} was {seat.state.value}"
    if seat.inside is not None:
        entry = seat.inside
        return f"{at}, inside {call(entry)}, number {entry.place} of {entry.group}, at {entry.site}{ids(entry)}"
    if seat.last is not None:
        entry = seat.last
        return f"{at}, its last collective was {call(entry)}, number {entry.place} of {entry.group}, at {entry.site}"
    return at


def death(seat: Seat) -> str:
    if seat.signal is not None:
        return f"was killed by {signal.Signals(seat.signal).name}"
    if seat.wait_status is not None:
        return f"ended with {os.waitstatus_to_exitcode(seat.wait_status)} and wrote no reason"
    return "is gone and wrote no reason"


def seat_record(seat: Seat) -> dict[str, Any]:
    """A rank as plain data."""
    return {
        "rank": seat.rank,
        "pid": seat.pid,
        "life": seat.life.value,
        "signal": seat.signal,
        "state": seat.state.value,
        "phase": seat.phase,
        "exit_code": seat.ending.exit_code if seat.ending is not None else None,
        "error_code": seat.ending.code or None if seat.ending is not None else None,
        "counts": dict(seat.counts),
        "inside": entry_record(seat.inside),
        "last": entry_record(seat.last),
    }


def entry_record(entry: Collective | None) -> dict[str, Any] | None:
    """A collective as plain data; the hash in hexadecimal."""
    if entry is None:
        return None
    return asdict(entry) | {"hash_u64": f"{entry.hash_u64:016x}"}
