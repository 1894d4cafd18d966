"""`tpctl crosswalk`: where each question of the v1.1 review is answered here."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from tpctl import complete, options
from tpctl.books.crosswalk import SECTIONS, Row, load
from tpctl.books.place import pick
from tpctl.output import Envelope, Format, Output
from tpctl.verdict import Coverage, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)
WIDTH = 80


@options.command(
    app,
    epilog="Examples: tpctl crosswalk | tpctl crosswalk p0 | tpctl crosswalk break-it -o json | "
    "tpctl crosswalk -o wide",
)
def crosswalk(
    out: Output,
    section: Annotated[
        str | None,
        typer.Argument(
            help=f"One of: {', '.join(SECTIONS)}. None: all.",
            metavar="SECTION",
            autocompletion=complete.crosswalk_sections,
        ),
    ] = None,
) -> None:
    """Map each question of the v1.1 review to code, checklist, drill and command. Lines are looked up now."""
    if section is not None:
        pick("crosswalk section", list(SECTIONS), section)
    rows = [row for row in load() if section in (None, row.section)]
    data = {"sections": dict(SECTIONS), "rows": [row.to_dict() for row in rows]}
    lines: list[str] = []
    for name, title in SECTIONS.items():
        mine = [row for row in rows if row.section == name]
        if mine:
            lines += ["", f"{title.upper()}  ({name})"]
        for row in mine:
            lines += ["", *_shown(row, out.format is Format.wide)]
    out.emit(
        Envelope("tpctl.crosswalk", Verdict.PASS, data, coverage=Coverage(len(rows), len(rows))),
        text=[*lines[1:], "", f"{len(rows)} rows, each with code, checklist, drill, command and runbook"],
    )


def _shown(row: Row, wide: bool) -> list[str]:
    lines = textwrap.wrap(f"{row.title}: {row.question}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    lines += textwrap.wrap(row.answer, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += [f"  {place}  {place.symbol.partition(':')[2]}" for place in row.places()[: None if wide else 3]]
    facts = [f"checklist {row.checklist}", f"drill {', '.join(row.drills)}", f"runbook {row.runbook}"]
    return [
        *lines,
        *textwrap.wrap("; ".join(facts), WIDTH, initial_indent="  ", subsequent_indent="  "),
        f"  $ {row.command}",
    ]
