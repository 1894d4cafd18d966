"""`tpctl help`: topics that belong to no single command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tpctl import options
from tpctl.errors import CliError
from tpctl.exitcodes import MEANING
from tpctl.output import Column, Envelope, Output, Table
from tpctl.verdict import Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def exit_codes() -> tuple[Table, list[str]]:
    rows = [{"code": int(code), "meaning": meaning} for code, meaning in MEANING.items()]
    return Table([Column("code", "code", right=True), Column("meaning", "meaning")], rows), [
        "",
        "Where several apply, the worst wins. The codes of a rank (70 to 77) stand in its report, not here.",
    ]


TOPICS: dict[str, tuple[str, Callable[[], tuple[Table, list[str]]]]] = {
    "exit-codes": ("what each exit code of tpctl means", exit_codes),
}


@options.command(app, epilog="Examples: tpctl help exit-codes")
def help_topic(
    out: Output,
    topic: Annotated[str | None, typer.Argument(help="The topic; without one, the list of topics.")] = None,
) -> None:
    """Explain a topic that belongs to no single command."""
    if topic is None:
        rows = [{"topic": name, "about": about} for name, (about, _) in TOPICS.items()]
        table = Table([Column("topic", "topic"), Column("about", "about")], rows)
        out.emit(Envelope("tpctl.help", Verdict.PASS, {"topic": None, "rows": rows}), [table])
        return
    if topic not in TOPICS:
        raise CliError(f"there is no help topic '{topic}'; topics: {', '.join(TOPICS)}", next_step="tpctl help")
    table, text = TOPICS[topic][1]()
    out.emit(Envelope("tpctl.help", Verdict.PASS, {"topic": topic, "rows": list(table.rows)}), [table], text)
