"""`tpctl cut JOB`: a hard cut."""

from __future__ import annotations

import typer

from tpctl import options
from tpctl.jobs.steer import IdOption, TimeoutOption, steer
from tpctl.output import Format, Output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Examples: tpctl cut JOB | tpctl cut JOB --timeout 0 -o json")
def cut(
    name: options.JobArgument,
    request_id: IdOption = None,
    timeout: TimeoutOption = 60.0,
    output: options.OutputOption = Format.table,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Begin a running job's stream anew: empty caches, the first frame again."""
    out = Output.open(output, quiet, no_color, debug)
    steer(out, name, {"cut": True}, request_id, timeout)
