"""`tpctl schema`: the published JSON Schemas."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl import complete, options
from tpctl.output import Column, Envelope, Format, Output, Table, to_json, to_yaml
from tpctl.schemas import load_schema, names
from tpctl.verdict import Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


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
