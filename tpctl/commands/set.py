"""`tpctl set JOB KEY=VALUE`: the values of a stream that may change while it runs."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from tpctl import options
from tpctl.errors import CliError
from tpctl.jobs.steer import IdOption, TimeoutOption, steer
from tpctl.nearest import hint
from tpctl.output import Output

KEYS = ("bias", "recompute", "paused")
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    "set",
    epilog="Examples: tpctl set JOB bias=0.5 | tpctl set JOB bias=1 recompute=true | tpctl set JOB paused=true",
)
def set_(
    out: Output,
    name: options.JobArgument,
    pairs: Annotated[
        list[str], typer.Argument(help="bias (0 to 1), recompute or paused (true, false).", metavar="KEY=VALUE")
    ],
    request_id: IdOption = None,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Change what may change while a job runs. All values of one command apply at the same chunk.

    `paused=true` holds the stream before its next chunk, which the receipt names; heartbeats go on.
    """
    steer(out, name, dict(map(_parsed, pairs)), request_id, timeout)


def _parsed(pair: str) -> tuple[str, float | bool]:
    """Raises CliError: an unknown key, or a value of the wrong kind."""
    key, _, text = pair.partition("=")
    if key not in KEYS:
        near = hint(key, KEYS, cutoff=0.4)
        raise CliError(f"'{key}' cannot change while a job runs{near}", code="TP-7623", next_step="tpctl set --help")
    if key != "bias" and text in ("true", "false"):
        return key, text == "true"
    if key == "bias":
        with contextlib.suppress(ValueError):
            return key, float(text)
    raise CliError(f"{key} cannot be {text!r}", code="TP-7624", next_step="tpctl set --help")
