"""`tpctl cut JOB`: a hard cut."""

from __future__ import annotations

import typer

from tpctl import options
from tpctl.jobs.steer import IdOption, TimeoutOption, steer
from tpctl.output import Output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl cut JOB | tpctl cut JOB --timeout 0 -o json")
def cut(
    out: Output,
    name: options.JobArgument,
    request_id: IdOption = None,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Begin a running job's stream anew: empty caches, the first frame again."""
    steer(out, name, {"cut": True}, request_id, timeout)
