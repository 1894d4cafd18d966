"""Drill hooks, in the order in which a rank comes by them: the difference, the guard, the break."""

from __future__ import annotations

from engine.blackbox import BlackBox
from engine.comm.topology import Groups
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.faults.acts import debug_collective
from engine.faults.compiler import EARLY
from engine.faults.scene import Parts, Scene, mark
from engine.faults.table import AUDITED, FAULTS
from engine.faults.unguard import UNGUARD


def differ(config: EngineConfig, rank: int) -> EngineConfig:
    """The configuration of this rank, of a drill that there is: see `EngineConfig.of_rank`.

    Raises:
        ConfigError: a drill that nobody knows, or a malformed `differs`.
    """
    drill = config.drill
    if not drill.id:
        return config
    if drill.id in AUDITED and drill.without_guard:
        raise ConfigError(f"{drill.id} has no guard to switch off: an audit finds it", code="TP-1013")
    if drill.id not in FAULTS and drill.id not in AUDITED:
        raise ConfigError(f"drill.id: there is no drill '{drill.id}'", code="TP-1013", next_step="tpctl drill --list")
    return config.of_rank(rank)


def before_handshake(config: EngineConfig, rank: int, blackbox: BlackBox) -> None:
    """First act of a drill: guards off where asked for, what breaks before there is anything to break, its mark."""
    drill = config.drill
    if not drill.id:
        return
    if drill.without_guard:
        UNGUARD[drill.id](rank)
    early = EARLY.get(drill.id)
    if early is not None and (early.everyone or rank == drill.victim_rank):
        early.act()
    if rank == drill.victim_rank and (drill.differs or early is not None):
        blackbox.commit(mark(drill), "-", {})


def plant(
    config: EngineConfig,
    rank: int,
    blackbox: BlackBox,
    groups: Groups,
    parts: Parts,
) -> None:
    """Break this rank, if it is the victim of the drill that the configuration names.

    Raises:
        ConfigError: it breaks something that this rank of the plan does not hold.
    """
    drill = config.drill
    if not drill.id:
        return
    scene = Scene(drill, rank, blackbox, groups, parts)
    if drill.debug_collective and parts.stage1 is not None:
        debug_collective(scene)
    if rank == drill.victim_rank:
        (FAULTS.get(drill.id) or AUDITED[drill.id])(scene)
