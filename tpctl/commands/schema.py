"""`tpctl schema`: the published JSON Schemas."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Annotated, Any

import typer

from tpctl import complete, options
from tpctl.errors import CliError
from tpctl.output import Column, Envelope, Format, Output, Table, to_json, to_yaml
from tpctl.verdict import Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def names() -> list[str]:
    """All published schemas."""
    folder = resources.files("tpctl") / "schemas"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def load_schema(name: str) -> dict[str, Any]:
    """One schema as data. Raises CliError for a name that is not published."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise CliError(f"there is no schema '{name}'{hint}", next_step="tpctl schema")
    text = (resources.files("tpctl") / "schemas" / f"{name}.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@options.command(app, epilog="Examples: tpctl schema | tpctl schema bringup | tpctl schema env -o yaml")
def schema(
    out: Output,
    name: Annotated[
        str | None, typer.Argument(help="The schema; without one, the list.", autocompletion=complete.schemas)
    ] = None,
) -> None:
    """Print the JSON Schema (2020-12) of a command's output or of a file. The schema itself is bare, not enveloped."""
    if name is not None:
        found = load_schema(name)
        if out.format is Format.yaml:
            print("\n".join(to_yaml(found)))
        else:
            print(to_json(found, indent=None if out.format is Format.jsonl else 2))
        return
    rows = [{"name": item, "title": load_schema(item)["title"]} for item in names()]
    out.emit(
        Envelope("tpctl.schema", Verdict.PASS, {"schemas": rows}),
        [Table([Column("schema", "name"), Column("describes", "title")], rows)],
    )
