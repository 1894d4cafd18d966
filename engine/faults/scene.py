"""The victim of a drill, as its faults see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.blackbox import BlackBox
from engine.comm.topology import Groups
from engine.comm.transport import BroadcastLink
from engine.config import DrillConfig
from engine.stage1 import Stage1

if TYPE_CHECKING:  # a generator-only worker never imports the codecs
    from engine.materials import Materials

Method = Callable[..., Any]


@dataclass
class Scene:
    """The parts of the victim that a fault may touch."""

    drill: DrillConfig
    rank: int
    blackbox: BlackBox
    groups: Groups
    link: BroadcastLink
    stage1: Stage1
    materials: Materials | None

    def inject(self) -> None:
        """Record that the thing is broken now."""
        ids = {**self.groups.gate.ids, "chunk_index": self.drill.at_chunk}
        self.blackbox.commit(mark(self.drill), "-", ids)


def mark(drill: DrillConfig) -> str:
    """The commitment point of the break; black boxes keep 16 bytes."""
    return f"inject {drill.id}"[:16]


def wrap(owner: object, name: str, make: Callable[[Method], Method]) -> None:
    """Put `make(method)` in place of a method; a name that does not exist is an error, so no drill goes stale."""
    setattr(owner, name, make(getattr(owner, name)))
