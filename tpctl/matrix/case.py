"""A case of a matrix: what runs, and what it must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.plan import PP_PLANS


@dataclass(frozen=True)
class Case:
    """One cell of the matrix. `reference` is the single-process case it must equal, `differs_from` one it must not, or
    one that it is measured against. `skip_on` is an error code that says what a host may lack: a case whose ranks all
    refuse with it is skipped.

    `kind` is `run`, `parity`, or `drill`: then `id` is the drill's, and the table of drills has the demands.
    """

    id: str
    title: str
    kind: str = "run"
    plan: str = "v0_full_pipeline"
    tp: int = 1
    chunks: int = 3
    events: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    expect: str = "pass"
    deadline_s: float = 180.0
    gates: tuple[str, ...] = ()
    reference: str | None = None
    differs_from: str | None = None
    skip_on: str = ""

    @property
    def ranks(self) -> int:
        """Of the whole job: with a pp plan, rank 0 stands before the mesh."""
        return self.tp + (1 if self.plan in PP_PLANS else 0)

    def needs(self) -> tuple[str, ...]:
        """Cases that must have run before this one."""
        return tuple(name for name in (self.reference, self.differs_from) if name)
