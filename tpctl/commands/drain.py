"""`tpctl drain JOB`: finish what is in flight, end every rank, account for all of it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from engine.config import load
from tpctl import options
from tpctl.errors import JobError
from tpctl.exitcodes import ExitCode
from tpctl.jobs import ending, place
from tpctl.jobs.ending import Receipt
from tpctl.jobs.order import OnDeadline
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app, epilog="Examples: tpctl drain JOB | tpctl drain JOB --deadline 10 -o json | tpctl drain JOB --dry-run"
)
def drain(
    out: Output,
    name: options.JobArgument,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=0.1, help="Seconds for all of it; the job's own if not given.")
    ] = None,
    on_deadline: Annotated[
        OnDeadline, typer.Option("--on-deadline", help="Then: abort, or fail (the job's own deadline still ends it).")
    ] = OnDeadline.abort,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Drain a job. A second drain attaches to the first; Ctrl-C detaches from it, and the drain goes on."""
    job = place.find(name)
    seen = ending.require_running(job)
    own_s = load([("job", job.config)]).config.liveness.drain_deadline_s
    if deadline is not None and deadline > own_s:
        raise JobError(
            f"--deadline is {deadline:g} s, but the ranks of job '{name}' end themselves after {own_s:g} s of draining",
            code="TP-7620",
            next_step=f"tpctl drain {name} --deadline {own_s:g}",
        )
    if dry_run:
        words = f"would drain {name} within {deadline or own_s:g} s, then {on_deadline.value}"
        receipt = {**ending.receipt(job, None, seen).to_dict(), "dry_run": True}
        out.emit(
            Envelope("tpctl.drain", Verdict.SKIP, receipt, (Finding("job.drain", Verdict.SKIP, words),), run_id=name),
            text=[words],
        )
        return
    order, attached = ending.order_drain(job, deadline or own_s, on_deadline)
    if attached and not seen.over:
        print(f"attached to a drain asked for {order.age_s():.1f} s ago", file=sys.stderr)
    limit_s = max(0.0, order.deadline_s - order.age_s())
    try:
        seen = ending.follow(job, limit_s + (ending.ABORT_S if order.on_deadline is OnDeadline.abort else 0.0))
    except KeyboardInterrupt:
        print(f"detached: the drain of {name} goes on; next: tpctl drain {name}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    finish(out, "tpctl.drain", ending.receipt(job, order, seen))


def finish(out: Output, schema: str, receipt: Receipt, wanted: str = "drained") -> None:
    """Print a receipt, and exit with what it says."""
    code, verdict = judge(receipt, wanted)
    words = [f"{receipt.job}: {receipt.ending or 'not over'} after {receipt.wall_s:.1f} s"]
    if receipt.why:
        words.append(f"  {receipt.why}")
    if receipt.account is not None:
        words.append("  chunks: " + ", ".join(f"{count} {fate}" for fate, count in receipt.account.items()))
    words += [f"  {phase['name']} at {phase['t_s']:.2f} s" for phase in receipt.phases]
    words += [f"  blocked by {blocker}" for blocker in receipt.blockers]
    words += [f"  left behind: {what}" for what in receipt.leftovers]
    step = f"tpctl status {receipt.job}"
    finding = Finding("job.ending", verdict, words[0], receipt.ending, next=step)
    envelope = Envelope(schema, verdict, receipt.to_dict(), (finding,), next=(step,), run_id=receipt.job)
    out.emit(envelope, text=words)
    raise typer.Exit(int(code))


def judge(receipt: Receipt, wanted: str = "drained") -> tuple[ExitCode, Verdict]:
    """0 only for an ending without loss and without anything left behind, whose account balances."""
    if receipt.ending is None:
        return ExitCode.DEADLINE, Verdict.FAIL
    if receipt.balanced is False or receipt.leftovers or receipt.ending in ("failed", "lost"):
        return ExitCode.CHECK_FAILED, Verdict.FAIL
    if receipt.ending == "aborted" and wanted == "drained":
        return ExitCode.DEADLINE, Verdict.FAIL
    if receipt.abandoned_chunks:
        return ExitCode.DRAINED_WITH_LOSS, Verdict.WARN
    return ExitCode.PASS, Verdict.PASS
