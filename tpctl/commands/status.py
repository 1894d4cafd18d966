"""`tpctl status JOB`: what runs, whether it advances, and where each rank is."""

from __future__ import annotations

import typer

from tpctl import options
from tpctl.exitcodes import for_verdict
from tpctl.jobs import place
from tpctl.jobs.view import RANK_COLUMNS, look, rank_rows, row
from tpctl.output import Envelope, Output, Table

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl status JOB | tpctl status JOB -o json | tpctl status JOB -o wide")
def status(
    out: Output,
    name: options.JobArgument,
) -> None:
    """Say whether a job's frames advance, and where each of its ranks is."""
    found = look(place.find(name))
    health, rows = found.health, rank_rows(found.seen)
    data = {
        **row(found),
        "directory": str(found.job.path),
        "run_dir": str(found.seen.run_dir) if found.seen.run_dir else None,
        "metrics_url": found.seen.record.metrics_url,
        "ranks": rows,
        "attempts": [
            {
                "number": attempt.number,
                "started_at": attempt.started_at,
                "ended_at": attempt.ended_at,
                "returncode": attempt.returncode,
                "reason": attempt.reason,
            }
            for attempt in found.seen.record.attempts
        ],
    }
    steps = tuple(finding.next for finding in health.findings if finding.next)
    words = [f"{name}: {health.state.value.upper()}  {health.verdict.value}"]
    words += [f"  {finding.message}" for finding in health.findings]
    if health.account:
        words.append("  chunks: " + ", ".join(f"{count} {fate}" for fate, count in health.account.items()))
    if found.seen.record.metrics_url and found.seen.supervisor_alive:
        words.append(f"  metrics: {found.seen.record.metrics_url}")
    words += [f"next: {step}" for step in steps[:1]]
    out.emit(
        Envelope("tpctl.status", health.verdict, data, health.findings, health.coverage, steps, name),
        [Table(RANK_COLUMNS, rows)] if rows else [],
        words,
    )
    raise typer.Exit(int(for_verdict(health.verdict)))
