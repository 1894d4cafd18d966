"""`tpctl env`: snapshot of this host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import ConfigError
from tpctl import options, snapshot
from tpctl.output import Column, Envelope, Format, Output, Table
from tpctl.verdict import Coverage, Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl env | tpctl env -o yaml | tpctl env --save host-a.toml")
def env(
    out: Output,
    given: options.Given,
    save: Annotated[
        Path | None, typer.Option("--save", help="Also write the snapshot as TOML, for parity-check.", metavar="FILE")
    ] = None,
) -> None:
    """Show this host: hardware, versions, thread settings, the environment by allow-list, the configuration."""
    findings: tuple[Finding, ...] = ()
    try:
        taken = snapshot.take(given.resolve())
    except ConfigError as error:
        taken = snapshot.take(error)
        findings = (Finding(error.code, Verdict.WARN, error.message, next=error.next_step),)
    step = "tpctl parity-check HOST-A.toml HOST-B.toml"
    if save is not None:
        snapshot.save(taken, save)
        out.say(f"saved {save}")
        step = f"tpctl parity-check {save} OTHER-HOST.toml"
    rows = [{"key": key, "value": value} for key, value in snapshot.flatten(taken).items()]
    narrow = [row for row in rows if out.format is Format.wide or not row["key"].startswith("config.")]
    shown = [{"key": row["key"], "value": v if isinstance(v := row["value"], str) else json.dumps(v)} for row in narrow]
    out.emit(
        Envelope(
            "tpctl.env",
            findings[0].verdict if findings else Verdict.PASS,
            taken,
            findings,
            Coverage(len(rows), len(rows)),
            (step,),
        ),
        [Table([Column("key", "key"), Column("value", "value")], shown)],
        [f"{f.verdict}  {f.message}" for f in findings],
    )
