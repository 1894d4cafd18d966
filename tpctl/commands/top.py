"""`tpctl top [JOB]`: jobs and ranks, live."""

from __future__ import annotations

import sys
import threading
from typing import Annotated, Any

import typer

from tpctl import options
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.jobs.board import Board, board, words
from tpctl.output import STYLE, Envelope, Format, Output, cell

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    epilog="Examples: tpctl top --once | tpctl top JOB | tpctl top JOB --interval 0.5 | tpctl top JOB -o jsonl",
)
def top(
    out: Output,
    name: Annotated[str | None, typer.Argument(help="Only this job, until it ends.", metavar="[JOB]")] = None,
    once: Annotated[bool, typer.Option("--once", help="One look, then leave; so too off a terminal.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch jobs and ranks: does each advance, in which phase is each rank, what did it commit to last.

    On a terminal it goes on until Ctrl-C, or until the named job ends. With -o jsonl each look is one line.
    """
    shown = board(name)
    streams = out.format is Format.jsonl
    live = out.format in (Format.table, Format.wide) and out.pretty(sys.stdout)
    interrupted = False
    if not once and (streams or live):
        try:
            shown = _stream(out, name, interval, shown) if streams else _live(out, name, interval, shown)
        except KeyboardInterrupt:
            interrupted = True
    elif streams:
        out.stream("snapshot", shown.to_dict())
    steps = tuple(dict.fromkeys(finding.next for finding in shown.findings if finding.next))
    envelope = Envelope("tpctl.top", shown.verdict, shown.to_dict(), shown.findings, shown.coverage, steps, name)
    out.emit(envelope, shown.tables() if shown.jobs else [], words(shown))
    raise typer.Exit(int(ExitCode.INTERRUPTED if interrupted else for_verdict(shown.verdict)))


def _stream(out: Output, name: str | None, interval_s: float, shown: Board) -> Board:
    out.stream("snapshot", shown.to_dict())
    while not shown.over:
        threading.Event().wait(interval_s)
        shown = board(name)
        out.stream("snapshot", shown.to_dict())
    return shown


def _live(out: Output, name: str | None, interval_s: float, shown: Board) -> Board:
    from rich.console import Console
    from rich.live import Live

    with Live(_view(out, shown), console=Console(), screen=True, auto_refresh=False) as live:
        while not shown.over:
            threading.Event().wait(interval_s)
            shown = board(name)
            live.update(_view(out, shown), refresh=True)
    return shown


def _view(out: Output, shown: Board) -> Any:
    """The tables as they fit the terminal, with the verdicts in their colours."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[Any] = [Text(f"tpctl top  {shown.to_dict()['ts'][11:19]}Z  Ctrl-C leaves", style="dim"), Text()]
    for table in shown.tables() if shown.jobs else []:
        columns = [column for column in table.columns if column.narrow or out.format is Format.wide]
        view = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        for column in columns:
            view.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
        for row in table.rows:
            cells = [cell(row.get(column.key)) for column in columns]
            view.add_row(*(Text(text, style=STYLE.get(text, "")) for text in cells))
        parts += [view, Text()]
    parts += [Text(line, style=STYLE.get(line.partition(" ")[0], "")) for line in words(shown)]
    return Group(*parts)
