"""The published JSON Schemas (2020-12): of what commands print, and of files."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from tpctl.errors import CliError
from tpctl.nearest import hint

FOLDER = resources.files(__name__)


def names() -> list[str]:
    """All published schemas."""
    return sorted(item.name.removesuffix(".json") for item in FOLDER.iterdir() if item.name.endswith(".json"))


def load_schema(name: str) -> dict[str, Any]:
    """One schema as data. Raises CliError for a name that is not published."""
    if name not in names():
        raise CliError(f"there is no schema '{name}'{hint(name, names())}", next_step="tpctl schema")
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
