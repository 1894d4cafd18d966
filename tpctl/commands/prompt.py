"""`tpctl prompt JOB TEXT`: another prompt from the next chunk on."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl import options
from tpctl.jobs.steer import IdOption, TimeoutOption, steer
from tpctl.output import Output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl prompt JOB 'a fox at night' | tpctl prompt JOB 'a harbour' --cut")
def prompt(
    out: Output,
    name: options.JobArgument,
    text: Annotated[str, typer.Argument(help="The prompt.", metavar="TEXT")],
    cut: Annotated[bool, typer.Option("--cut", help="Begin the stream anew with it.")] = False,
    request_id: IdOption = None,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Give a running job another prompt. It applies to a whole chunk, which the receipt names."""
    change: dict[str, object] = {"prompt": text} | ({"cut": True} if cut else {})
    steer(out, name, change, request_id, timeout)
