"""`tpctl abort JOB`: end it now, and say what was lost."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl import options
from tpctl.commands.drain import finish
from tpctl.errors import JobError
from tpctl.jobs import ending, place
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl abort JOB --yes | tpctl abort JOB --dry-run")
def abort(
    out: Output,
    name: options.JobArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Work in flight may be lost.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """End a job now. What was in flight is abandoned, and the receipt says which chunks."""
    job = place.find(name)
    seen = ending.require_running(job)
    if dry_run:
        words = f"would end {name}: {len(seen.ranks)} rank(s), without waiting for what is in flight"
        receipt = {**ending.receipt(job, None, seen).to_dict(), "dry_run": True}
        finding = Finding("job.abort", Verdict.SKIP, words)
        out.emit(Envelope("tpctl.abort", Verdict.SKIP, receipt, (finding,), run_id=name), text=[words])
        return
    if not yes:
        raise JobError(
            f"an abort of '{name}' loses what is in flight; a drain does not",
            code="TP-7622",
            next_step=f"tpctl drain {name}; or this command with --yes",
        )
    if seen.over:
        order = None
        ending.bury(job, seen)
    else:
        order = ending.order_abort(job)
        seen = ending.follow(job, ending.ABORT_S)
    finish(out, "tpctl.abort", ending.receipt(job, order, seen), wanted="aborted")
