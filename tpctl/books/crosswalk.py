"""The crosswalk: each question of the v1.1 review, and where this repository answers it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from tpctl.books.place import BookError
from tpctl.books.symbol import Place, resolve

# What a row can be, in the order in which they are shown.
SECTIONS = {
    "scaffold": "The v1.1 scaffold, section by section",
    "break-it": "The four standard break-it tests: tpctl drill standard",
    "p0": "The v1.1 P0 list",
    "tripwire": "The optional tripwire",
    "topics": "The operator topics",
    "cards": "The cards of background",
    "todo": "What the map itself had left open",
}


@dataclass(frozen=True)
class Row:
    """One question. `answers` are symbols (`tpctl.books.symbol`); ids of checklists, drills, runbooks or cards."""

    section: str
    title: str
    question: str
    answer: str
    answers: tuple[str, ...]
    checklist: str
    drills: tuple[str, ...]
    command: str
    runbook: str

    def places(self) -> list[Place]:
        """Where it is answered, in files as they are now. Raises BookError for what is gone."""
        return [resolve(symbol) for symbol in self.answers]

    def to_dict(self) -> dict[str, Any]:
        return {
            "section": self.section,
            "title": self.title,
            "question": self.question,
            "answer": self.answer,
            "places": [{"symbol": p.symbol, "file": p.file, "line": p.line} for p in self.places()],
            "checklist": self.checklist,
            "drills": list(self.drills),
            "command": self.command,
            "runbook": self.runbook,
        }


def load() -> tuple[Row, ...]:
    """All rows, in the order of the file.

    Raises:
        BookError: an unknown key or section, or one that is missing.
    """
    text = (resources.files("tpctl") / "books" / "crosswalk.toml").read_text(encoding="utf-8")
    return tuple(_row(row) for row in tomllib.loads(text)["row"])


def _row(row: Mapping[str, Any]) -> Row:
    known = {item.name for item in fields(Row)}
    if wrong := sorted(known ^ row.keys()):
        raise BookError(f"crosswalk row {row.get('title')!r}: '{wrong[0]}' is missing or unknown", code="TP-8113")
    if row["section"] not in SECTIONS:
        raise BookError(f"crosswalk row {row['title']!r}: unknown section '{row['section']}'", code="TP-8113")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Row(**values)
