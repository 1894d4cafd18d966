"""What a shell completes: the ids of jobs, cases, drills, schemas and books. Each reads what it needs when asked."""

from __future__ import annotations

from collections.abc import Iterable


def jobs(incomplete: str) -> list[str]:
    from tpctl.jobs.place import names

    return _begin(names(), incomplete)


def cases(incomplete: str) -> list[str]:
    from tpctl.matrix.cases import builtin

    return _begin((case.id for level in (1, 2, 3) for case in builtin(level).cases), incomplete)


def drills(incomplete: str) -> list[str]:
    from tpctl.drill.table import load

    return _begin((drill.id for drill in load()), incomplete)


def schemas(incomplete: str) -> list[str]:
    from tpctl.schemas import names

    return _begin(names(), incomplete)


def checklists(incomplete: str) -> list[str]:
    from tpctl.books.place import CHECKLISTS, ids

    return _begin(ids(CHECKLISTS, ".toml"), incomplete)


def runbooks(incomplete: str) -> list[str]:
    from tpctl.books.runbook import all_ids

    return _begin(all_ids(), incomplete)


def crosswalk_sections(incomplete: str) -> list[str]:
    from tpctl.books.crosswalk import SECTIONS

    return _begin(SECTIONS, incomplete)


def config_keys(incomplete: str) -> list[str]:
    from engine.config import dotted_keys

    return _begin((f"{key}=" for key in dotted_keys()), incomplete)


def _begin(ids: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(ids) if name.startswith(incomplete)]
