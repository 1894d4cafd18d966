"""`tpctl restart JOB`: drain it, and start it again with the configuration that it was given."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from engine.config import load
from tpctl import options
from tpctl.errors import RefusedError
from tpctl.exitcodes import ExitCode
from tpctl.jobs import ending, place, start
from tpctl.jobs.blocker import blockers
from tpctl.jobs.observe import observe
from tpctl.jobs.order import OnDeadline, read_order
from tpctl.jobs.record import JobRecord
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl restart JOB | tpctl restart JOB -o json")
def restart(
    out: Output,
    name: options.JobArgument,
    no_referee: Annotated[
        bool, typer.Option("--no-referee", help="No referee beside the ranks; their own budgets remain.")
    ] = False,
) -> None:
    """Drain a job, then start it again. One that is over is started as it is; every attempt's files stay."""
    job = place.find(name)
    seen = observe(job)
    if not seen.over:
        own_s = load([("job", job.config)]).config.liveness.drain_deadline_s
        order, _ = ending.order_drain(job, own_s, OnDeadline.abort)
        try:
            seen = ending.follow(job, max(0.0, order.deadline_s - order.age_s()) + ending.ABORT_S)
        except KeyboardInterrupt:
            print(f"detached: the drain of {name} goes on, and nothing follows it", file=sys.stderr)
            raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    receipt = ending.receipt(job, read_order(job.order), seen)
    alive = [left for left in receipt.leftovers if left.startswith("process")]
    if receipt.ending is None or alive:
        what = ", ".join([str(one) for one in blockers(seen.ranks, seen.now_ns)] or alive)
        raise RefusedError(f"job '{name}' did not end: {what}", code="TP-7625", next_step=f"tpctl abort {name} --yes")
    pid = start.start(job, start.revive(job), not no_referee)
    record = JobRecord.read(job.record)
    words = f"job {name} is started again, as attempt {record.first_attempt}; before: {receipt.ending}"
    step = f"tpctl wait {name} --for running"
    finding = Finding("job.restart", Verdict.PASS, words, receipt.ending, next=step)
    data = {
        "name": name,
        "job_id": record.job_id,
        "directory": str(job.path),
        "pid": pid,
        "attempt": record.first_attempt,
        "ending": receipt.ending,
        "account": receipt.account,
    }
    out.emit(
        Envelope("tpctl.restart", Verdict.PASS, data, (finding,), next=(step,), run_id=name),
        text=[words, f"next: {step}"],
    )
