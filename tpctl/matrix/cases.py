"""Matrix files: which cases to run, and which gates each must pass."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from engine.config import dotted_keys, read_toml
from engine.plan import PLANS, canonical_plan
from engine.timeline import Timeline
from tpctl.drill import table as drilltable
from tpctl.errors import MatrixError
from tpctl.matrix import ppgates as _  # noqa: F401 - its gates are among GATES once it is imported
from tpctl.matrix.case import Case
from tpctl.matrix.gates import GATES
from tpctl.nearest import hint

DEFAULT_LEVEL = 2
KINDS = ("run", "parity")
# What `drills = ` of a matrix file may ask for: each once, or each at every place that its table names.
DRILLS = ("none", "each", "everywhere")
EXPECT = ("pass", "refused")
KEYS = (
    "id",
    "title",
    "kind",
    "plan",
    "tp",
    "chunks",
    "event",
    "config",
    "expect",
    "deadline_s",
    "gates",
    "reference",
    "differs_from",
    "skip_on",
)


@dataclass(frozen=True)
class Matrix:
    """Cases in order. `flag` is how a command line names the matrix again; the default one needs no name."""

    title: str
    path: str
    cases: tuple[Case, ...]
    flag: str = ""

    def select(self, ids: Sequence[str]) -> Matrix:
        """Only these cases and those they need, in the file's order. An id may be a pattern, as `O-*`.

        Raises:
            MatrixError: an id that the matrix does not have; the nearest is named.
        """
        known = {case.id: case for case in self.cases}
        wanted: set[str] = set()
        queue = list(ids)
        while queue:
            name = queue.pop()
            if name not in known:
                matching = fnmatch.filter(known, name)
                if not matching:
                    raise MatrixError(f"{self.path}: there is no case '{name}'{hint(name, known)}", code="TP-7302")
                queue += matching
            elif name not in wanted:
                wanted.add(name)
                queue += known[name].needs()
        return replace(self, cases=tuple(case for case in self.cases if case.id in wanted))


def builtin(level: int) -> Matrix:
    """The matrix that comes with tpctl for level 1, 2 or 3."""
    with resources.as_file(resources.files("tpctl.matrix") / f"level{level}.toml") as path:
        return replace(load_matrix(path), flag="" if level == DEFAULT_LEVEL else f" --level {level}")


def load_matrix(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        ConfigError: not readable, not TOML, or a timeline that cannot be.
        MatrixError: an unknown key, gate, plan, drill or case name, or a wrong type.
    """
    data = read_toml(path)
    where = path.name
    _only(data, ("title", "defaults", "case", "drills"), where)
    defaults = data.get("defaults", {})
    _only(defaults, KEYS, f"{where}: [defaults]")
    rows = data.get("case", [])
    if not isinstance(rows, list) or not rows:
        raise MatrixError(f"{where} has no [[case]]", code="TP-7303")
    cases = tuple(_case(row, defaults, f"{where}: case {number}") for number, row in enumerate(rows))
    seen: list[str] = []
    for case in cases:
        if case.id in seen:
            raise MatrixError(f"{where}: the case '{case.id}' stands there twice", code="TP-7304")
        for name in case.needs():
            if name not in seen:
                raise MatrixError(
                    f"{where}: case '{case.id}' refers to '{name}', which does not stand before it{hint(name, seen)}",
                    code="TP-7305",
                )
        seen.append(case.id)
    every = cases + _drills(data.get("drills", "none"), where)
    return Matrix(str(data.get("title", where)), where, every, f" --matrix {shlex.quote(str(path))}")


def _drills(wanted: Any, where: str) -> tuple[Case, ...]:
    """A case for each drill that the matrix asks for, behind its other cases."""
    if wanted not in DRILLS:
        raise MatrixError(f"{where}: drills must be one of {', '.join(DRILLS)}, is {wanted!r}", code="TP-7306")
    drills = drilltable.load() if wanted != "none" else ()
    return tuple(
        Case(
            drill.id,
            drill.title,
            "drill",
            drill.plan,
            drill.tp,
            int(drill.config["run.chunks"]),
            deadline_s=drill.deadline_s,
        )
        for drill in drills
        if wanted == "everywhere" or not drill.repeats
    )


def _case(row: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> Case:
    _only(row, KEYS, where)
    merged = {**defaults, **row, "config": {**defaults.get("config", {}), **row.get("config", {})}}
    name = merged.get("id")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise MatrixError(f"{where}: id must be a short name of letters, digits, '.', '_', '-', is {name!r}")
    where = f"{where} ({name})"
    for key, kind, words in (
        ("tp", int, "a whole number from 1"),
        ("chunks", int, "a whole number from 1"),
        ("deadline_s", (int, float), "seconds above 0"),
    ):
        value = merged.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
            raise MatrixError(f"{where}: {key} must be {words}, is {value!r}", code="TP-7306")
    for key, choices in (("kind", KINDS), ("expect", EXPECT)):
        if merged.get(key, choices[0]) not in choices:
            raise MatrixError(f"{where}: {key} must be one of {', '.join(choices)}, is {merged[key]!r}", code="TP-7306")
    plan = canonical_plan(str(merged.get("plan", Case.plan)))
    if plan not in PLANS:
        raise MatrixError(f"{where}: unknown plan '{plan}'{hint(plan, PLANS)}", code="TP-7307")
    gates = tuple(merged.get("gates", ()))
    for gate in gates:
        if gate not in GATES:
            raise MatrixError(f"{where}: unknown gate '{gate}'{hint(str(gate), GATES)}", code="TP-7308")
    if not gates and merged.get("kind", "run") == "run":
        raise MatrixError(f"{where}: a case without gates proves nothing; known: {', '.join(GATES)}", code="TP-7308")
    for key in merged["config"]:
        if key not in dotted_keys():
            raise MatrixError(f"{where}: unknown key '{key}'{hint(key, dotted_keys())}", code="TP-7309")
    events = tuple(merged.get("event", ()))
    if events:
        Timeline.from_events(events, where)
    return Case(
        id=name,
        title=str(merged.get("title", name)),
        kind=merged.get("kind", "run"),
        plan=plan,
        tp=merged.get("tp", 1),
        chunks=merged.get("chunks", Case.chunks),
        events=events,
        config=merged["config"],
        expect=merged.get("expect", "pass"),
        deadline_s=float(merged.get("deadline_s", Case.deadline_s)),
        gates=gates,
        reference=merged.get("reference"),
        differs_from=merged.get("differs_from"),
        skip_on=str(merged.get("skip_on", Case.skip_on)),
    )


def _only(data: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise MatrixError(f"{where}: must be a table", code="TP-7306")
    for key in data:
        if key not in known:
            raise MatrixError(f"{where}: unknown key '{key}'{hint(key, known)}", code="TP-7301")
