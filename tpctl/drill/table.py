"""The table of drills: what each breaks, and what must follow."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from typing import Any

from engine.plan import PP_PLANS, V1, canonical_plan
from tpctl.errors import MatrixError
from tpctl.nearest import hint

TP_EVERYWHERE = 4
# The four break-it tests of the crosswalk: anti-stranding, call-count mismatch, flag mismatch, stale epoch. One of
# them is also run with its guard off, to see the hang that the guard prevents.
STANDARD_NAME = "standard"
STANDARD = ("OM-01", "OM-03", "OM-05", "OM-09")
STANDARD_PROOF = "OM-05"


@dataclass(frozen=True)
class Drill:
    """One row of `tpctl/matrix/drills.toml`, defaults filled in. `fault` is the id that `engine.faults` knows.

    `tp` counts mesh ranks; with a pp plan, rank 0 stands before them. `cut_chunk` is where a hard cut comes.
    `repeats` names the drill that this one repeats with another victim.
    `kind` is the referee's verdict, where it is the referee that finds the fault; `referee` is whether there is one.
    With two `hosts` it is the link between them that breaks, and nothing is planted in a rank.
    """

    id: str
    title: str
    victim: tuple[int, ...]
    others: tuple[int, ...]
    code: tuple[str, ...]
    blame: str
    proof: str
    tp: int
    victim_rank: int
    at_chunk: int
    deadline_s: float
    within_ms: float
    gone_ms: float
    fm: str | None = None
    kind: tuple[str, ...] = ()
    referee: bool = True
    hosts: int = 1
    everywhere: bool = False
    repeats: str | None = None
    says: tuple[str, ...] = ()
    drift: bool = False
    differs: str = ""
    plan: str = V1
    cut_chunk: int = -1
    records: str = ""
    drops: bool = False
    compares: str = "latents"
    calls_after: int = -1
    proof_code: tuple[str, ...] = ()
    fault: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"rank {self.victim_rank} of {self.ranks}, chunk {self.at_chunk}"

    @property
    def ranks(self) -> int:
        return self.tp + int(self.plan in PP_PLANS)

    @property
    def lives(self) -> bool:
        """Whether the stream has to outlive the fault."""
        return self.blame == "nobody"


def load() -> tuple[Drill, ...]:
    """All drills, in the order of the file.

    Raises:
        MatrixError: an unknown key.
    """
    text = (resources.files("tpctl") / "matrix" / "drills.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)
    defaults = data["defaults"]
    known = {item.name for item in fields(Drill)}
    drills = []
    for row in data["drill"]:
        merged = {**defaults, **row, "config": {**defaults["config"], **row.get("config", {})}}
        merged["fault"] = merged.get("fault") or row["id"]
        merged["plan"] = canonical_plan(merged.get("plan", V1))
        if unknown := sorted(merged.keys() - known):
            raise MatrixError(f"drill {row['id']}: unknown key '{unknown[0]}'", code="TP-7309")
        drill = Drill(**{key: _frozen(value) for key, value in merged.items()})
        drills.append(drill)
        if drill.everywhere:
            places = {"first": 0, "middle": TP_EVERYWHERE // 2, "last": TP_EVERYWHERE - 1}
            drills += [
                replace(
                    drill,
                    id=f"{drill.id}.{place}",
                    title=f"{drill.title}; {place} of {TP_EVERYWHERE}",
                    repeats=drill.id,
                    tp=TP_EVERYWHERE,
                    victim_rank=rank,
                )
                for place, rank in places.items()
            ]
    return tuple(drills)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def select(drills: Sequence[Drill], wanted: Sequence[str]) -> tuple[Drill, ...]:
    """Drills by id; `OM-21` stands for all of its variants, `standard` for the four standard ones. No ids: all.

    Raises:
        MatrixError: an id that no drill has.
    """
    chosen: dict[str, Drill] = {}
    for name in [one for given in wanted for one in (STANDARD if given == STANDARD_NAME else (given,))]:
        found = {drill.id: drill for drill in drills if drill.id == name or drill.id.startswith(name + ".")}
        if not found:
            ids = [drill.id for drill in drills]
            raise MatrixError(
                f"there is no drill '{name}'{hint(name, ids)}", code="TP-7310", next_step="tpctl drill --list"
            )
        chosen |= found
    return tuple(chosen.values()) if wanted else tuple(drills)
