"""`tpctl prompt JOB TEXT`: another prompt from the next chunk on."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl import options
from tpctl.jobs.steer import IdOption, TimeoutOption, steer
from tpctl.output import Format, Output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Examples: tpctl prompt JOB 'a fox at night' | tpctl prompt JOB 'a harbour' --cut")
def prompt(
    name: options.JobArgument,
    text: Annotated[str, typer.Argument(help="The prompt.", metavar="TEXT")],
    cut: Annotated[bool, typer.Option("--cut", help="Begin the stream anew with it.")] = False,
    request_id: IdOption = None,
    timeout: TimeoutOption = 60.0,
    output: options.OutputOption = Format.table,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Give a running job another prompt. It applies to a whole chunk, which the receipt names."""
    out = Output.open(output, quiet, no_color, debug)
    change: dict[str, object] = {"prompt": text} | ({"cut": True} if cut else {})
    steer(out, name, change, request_id, timeout)
