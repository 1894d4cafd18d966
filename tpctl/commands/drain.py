"""`tpctl drain JOB`: finish what is in flight, end every rank, account for all of it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from engine.config import load
from tpctl import options
from tpctl.errors import JobError
from tpctl.exitcodes import ExitCode
from tpctl.jobs import ending, place
from tpctl.jobs.blocker import Blocker, blockers
from tpctl.jobs.ending import Receipt
from tpctl.jobs.observe import Seen, observe
from tpctl.jobs.order import OnDeadline, Order, read_order
from tpctl.jobs.place import JobDir
from tpctl.output import Envelope, Output
from tpctl.verdict import Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    epilog="Examples: tpctl drain JOB | tpctl drain JOB --deadline 10 -o json | tpctl drain JOB --dry-run | "
    "tpctl drain JOB --on-deadline resume | tpctl drain JOB --cancel",
)
def drain(
    out: Output,
    name: options.JobArgument,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=0.1, help="Seconds for all of it; the job's own if not given.")
    ] = None,
    on_deadline: Annotated[
        OnDeadline, typer.Option("--on-deadline", help="Then: abort; resume the stream, if it still can; or fail.")
    ] = OnDeadline.abort,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Take a drain back before its point of no return: the stream goes on.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Drain a job. A second drain attaches to the first; Ctrl-C detaches from it, and the drain goes on."""
    job = place.find(name)
    seen = ending.require_running(job)
    if cancel:
        _cancel(out, job, dry_run, deadline is not None or on_deadline is not OnDeadline.abort)
        return
    deadline_s = _deadline_s(job, deadline, on_deadline)
    if dry_run:
        parts = ", ".join(f"{phase} {budget_s:g} s" for phase, budget_s in ending.budgets(deadline_s).items())
        words = f"would drain {name} within {deadline_s:g} s ({parts}), then {on_deadline.value}"
        receipt = {**ending.receipt(job, None, seen).to_dict(), "dry_run": True}
        out.emit(
            Envelope("tpctl.drain", Verdict.SKIP, receipt, (Finding("job.drain", Verdict.SKIP, words),), run_id=name),
            text=[words],
        )
        return
    order, attached = ending.order_drain(job, deadline_s, on_deadline)
    if attached and not seen.over:
        print(f"attached to a drain asked for {order.age_s():.1f} s ago", file=sys.stderr)
    limit_s = max(0.0, order.deadline_s - order.age_s())
    try:
        seen = ending.follow(job, limit_s + WAIT_S[order.on_deadline], _Watcher(out, job, order).enough)
    except KeyboardInterrupt:
        print(f"detached: the drain of {name} goes on; next: tpctl drain {name}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    finish(out, "tpctl.drain", ending.receipt(job, order, seen))


# After the deadline: for the abort, for the stream to go on, for nothing.
WAIT_S = {OnDeadline.abort: ending.ABORT_S, OnDeadline.resume: ending.TAKE_BACK_S, OnDeadline.fail: 0.0}
# Of the ranks' own deadline, which would end them at the moment at which the stream is to go on.
RESUME_SHARE = 0.8


def _deadline_s(job: JobDir, asked_s: float | None, on_deadline: OnDeadline) -> float:
    """Raises JobError: the ranks would not keep this deadline."""
    own_s = load([("job", job.config)]).config.liveness.drain_deadline_s
    most_s = own_s * (RESUME_SHARE if on_deadline is OnDeadline.resume else 1.0)
    if asked_s is not None and asked_s > most_s:
        raise JobError(
            f"--deadline is {asked_s:g} s, but the ranks of job '{job.name}' end themselves after {own_s:g} s of "
            f"draining: {most_s:g} s is the most",
            code="TP-7620",
            next_step=f"tpctl drain {job.name} --deadline {most_s:g}",
        )
    return asked_s or most_s


class _Watcher:
    """Tells how a drain gets on, each thing once: phases, and who is late."""

    def __init__(self, out: Output, job: JobDir, order: Order) -> None:
        self._out, self._job, self._order = out, job, order
        self._told: set[str] = set()

    def enough(self, seen: Seen) -> bool:
        if seen.over:
            return True
        for phase in ending.receipt(self._job, self._order, seen).phases[-1:]:
            name = phase["name"]
            self._tell(name, f"{name}: since {phase['t_s']:.1f} s")
            if phase["late"]:
                blocked = "; ".join(map(str, blockers(seen.ranks, seen.now_ns)))
                self._tell(f"{name} late", f"{name} takes longer than its {phase['budget_s']:g} s; {blocked}")
        return ending.taken_back(self._job, self._order, seen)

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._out.say(line)


def _cancel(out: Output, job: JobDir, dry_run: bool, confused: bool) -> None:
    if confused:
        raise JobError(
            "--cancel takes a drain back; it has no deadline of its own",
            code="TP-7855",
            next_step=f"tpctl drain {job.name} --cancel",
        )
    order = read_order(job.order)
    if not dry_run:
        ending.order_take_back(job)
    words = f"{job.name}: " + (
        "would take its drain back" if dry_run else "the drain is taken back: the stream goes on"
    )
    verdict = Verdict.SKIP if dry_run else Verdict.PASS
    receipt = {**ending.receipt(job, order, observe(job)).to_dict(), "dry_run": dry_run}
    step = f"tpctl status {job.name}"
    finding = Finding("job.drain", verdict, words, next=step)
    out.emit(Envelope("tpctl.drain", verdict, receipt, (finding,), next=(step,), run_id=job.name), text=[words])


def finish(out: Output, schema: str, receipt: Receipt, wanted: str = "drained") -> None:
    """Print a receipt, and exit with what it says."""
    code, verdict = judge(receipt, wanted)
    words = [f"{receipt.job}: {receipt.ending or 'not over'} after {receipt.wall_s:.1f} s"]
    if receipt.taken_back:
        words[0] = f"{receipt.job}: the drain was taken back after {receipt.wall_s:.1f} s: the stream goes on"
    if receipt.why:
        words.append(f"  {receipt.why}")
    if receipt.account is not None:
        words.append("  chunks: " + ", ".join(f"{count} {fate}" for fate, count in receipt.account.items()))
    if receipt.drops and any(receipt.drops.values()):
        words.append("  dropped: " + ", ".join(f"{count} {reason}" for reason, count in receipt.drops.items()))
    words += [_phase_line(phase) for phase in receipt.phases]
    words += [f"  blocked by {Blocker(**blocker)}" for blocker in receipt.blockers]
    words += [f"  held up by {receipt.held_up_by}"] if receipt.held_up_by else []
    words += [f"  left behind: {what}" for what in receipt.leftovers]
    step = f"tpctl status {receipt.job}"
    finding = Finding("job.ending", verdict, words[0], receipt.ending, next=step)
    envelope = Envelope(schema, verdict, receipt.to_dict(), (finding,), next=(step,), run_id=receipt.job)
    out.emit(envelope, text=words)
    raise typer.Exit(int(code))


def _phase_line(phase: dict[str, Any]) -> str:
    took = f", took {phase['took_s']:.2f} s" if phase["took_s"] is not None else ""
    budget = f" of {phase['budget_s']:g} s" if took and phase["budget_s"] is not None else ""
    return f"  {phase['name']} at {phase['t_s']:.2f} s{took}{budget}{', late' if phase['late'] else ''}"


def judge(receipt: Receipt, wanted: str = "drained") -> tuple[ExitCode, Verdict]:
    """0 only for an ending without loss and without anything left behind, whose account balances."""
    if receipt.taken_back:
        late = receipt.on_deadline == OnDeadline.resume and receipt.wall_s >= receipt.deadline_s
        return (ExitCode.DEADLINE if late else ExitCode.CHECK_FAILED), Verdict.FAIL
    if receipt.ending is None:
        return ExitCode.DEADLINE, Verdict.FAIL
    if receipt.balanced is False or receipt.leftovers or receipt.ending in ("failed", "lost"):
        return ExitCode.CHECK_FAILED, Verdict.FAIL
    if receipt.ending == "aborted" and wanted == "drained":
        return ExitCode.DEADLINE, Verdict.FAIL
    if receipt.abandoned_chunks or (receipt.drops or {}).get("slow_sink"):
        return ExitCode.DRAINED_WITH_LOSS, Verdict.WARN
    return ExitCode.PASS, Verdict.PASS
