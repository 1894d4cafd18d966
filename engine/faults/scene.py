"""The victim of a drill, as its faults see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from engine.blackbox import BlackBox
from engine.comm.p2p import LeaderEnd, Stage0End
from engine.comm.topology import Groups
from engine.comm.transport import BroadcastLink
from engine.config import DrillConfig
from engine.errors import ConfigError
from engine.meshleader import MeshLeader
from engine.stage1 import Stage1

if TYPE_CHECKING:  # a mesh rank never imports the codecs
    from engine.materials import Materials
    from engine.overlap import Comms
    from engine.pipeline import Pipeline

Method = Callable[..., Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """What a rank holds of the engine; None is what its plan gives to other ranks."""

    link: BroadcastLink | None
    stage1: Stage1 | None
    materials: Materials | None
    pipeline: Pipeline | None = None
    leader: MeshLeader | None = None


@dataclass
class Scene:
    """The parts of the victim that a fault may touch. Each raises ConfigError where the victim has none."""

    drill: DrillConfig
    rank: int
    blackbox: BlackBox
    groups: Groups
    parts: Parts

    @property
    def link(self) -> BroadcastLink:
        return self._held(self.parts.link, "an end of the mesh link")

    @property
    def stage1(self) -> Stage1:
        return self._held(self.parts.stage1, "a generator")

    @property
    def materials(self) -> Materials:
        return self._held(self.parts.materials, "parts of Stage 0")

    @property
    def pipeline(self) -> Pipeline:
        return self._held(self.parts.pipeline, "a comms thread")

    @property
    def comms(self) -> Comms:
        return self.pipeline.comms

    @property
    def down(self) -> Stage0End:
        """Stage 0's end of the pp link."""
        return self.comms._link

    @property
    def up(self) -> LeaderEnd:
        """The mesh leader's end of the pp link."""
        return self._held(self.parts.leader, "the leader's end of a pp link").up

    def inject(self) -> None:
        """Record that the thing is broken now."""
        ids = {**self.groups.gate.ids, "chunk_index": self.drill.at_chunk}
        self.blackbox.commit(mark(self.drill), "-", ids)

    def _held(self, part: T | None, what: str) -> T:
        if part is None:
            raise ConfigError(f"drill {self.drill.id} breaks {what}, and rank {self.rank} has none", code="TP-1013")
        return part


def mark(drill: DrillConfig) -> str:
    """The commitment point of the break; black boxes keep 16 bytes."""
    return f"inject {drill.id}"[:16]


def wrap(owner: object, name: str, make: Callable[[Method], Method]) -> None:
    """Put `make(method)` in place of a method; a name that does not exist is an error, so no drill goes stale."""
    setattr(owner, name, make(getattr(owner, name)))
