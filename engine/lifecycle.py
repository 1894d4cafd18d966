"""States of a job and of a rank, their legal transitions in one table, and a rank's exit codes."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class RankExit(IntEnum):
    """Why a rank's process ended (contract, section 9)."""

    DRAINED = 0
    TRIPWIRE = 70
    ORPHANED = 71
    PHASE_BUDGET = 72
    PEER_ERROR = 73
    TRANSPORT = 74
    PARITY = 75
    POISONED = 76
    BAD_CONFIG = 77


class RankState(StrEnum):
    STARTING = "starting"
    JOINING = "joining"
    LOADING = "loading"
    WARMING = "warming"
    RUNNING = "running"
    DRAINING = "draining"
    SHUTDOWN = "shutdown"
    EXITED = "exited"
    ABORTED = "aborted"


class Doing(StrEnum):
    """What rank 0's loop is at: what the mesh waits for, unless it is the mesh itself."""

    NOTHING = ""
    SOURCE = "source"
    PREPARE = "phase A"
    MESH = "mesh"
    DECODE = "phase C"
    SINK = "sink"
    PAUSED = "paused"


TRANSITIONS: dict[RankState, frozenset[RankState]] = {
    RankState.STARTING: frozenset({RankState.JOINING}),
    RankState.JOINING: frozenset({RankState.LOADING}),
    RankState.LOADING: frozenset({RankState.WARMING}),
    RankState.WARMING: frozenset({RankState.RUNNING}),
    RankState.RUNNING: frozenset({RankState.DRAINING}),
    RankState.DRAINING: frozenset({RankState.SHUTDOWN}),
    RankState.SHUTDOWN: frozenset({RankState.EXITED}),
    RankState.EXITED: frozenset(),
    RankState.ABORTED: frozenset(),
}


def can_move(old: RankState, new: RankState) -> bool:
    """Any living state may abort; every other move must stand in `TRANSITIONS`."""
    if new is RankState.ABORTED:
        return old not in (RankState.EXITED, RankState.ABORTED)
    return new in TRANSITIONS[old]
