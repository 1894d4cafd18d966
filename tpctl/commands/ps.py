"""`tpctl ps`: every job of this user on this host."""

from __future__ import annotations

from typing import Annotated

import typer

from tpctl import options
from tpctl.errors import JobError
from tpctl.exitcodes import for_verdict
from tpctl.jobs import place
from tpctl.jobs.health import OVER
from tpctl.jobs.view import COLUMNS, look, row, unreadable
from tpctl.output import Envelope, Output, Table
from tpctl.verdict import Coverage, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(app, epilog="Examples: tpctl ps | tpctl ps --all | tpctl ps -o json")
def ps(
    out: Output,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those that are over as well.")] = False,
) -> None:
    """List the jobs of this user on this host, and whether each is well."""
    rows, findings, verdicts, checked = [], [], [], 0
    for name in place.names():
        try:
            found = look(place.find(name))
        except JobError as error:
            problem = unreadable(name, error)
            rows.append(problem[0])
            findings.append(problem[1])
            verdicts.append(Verdict.UNKNOWN)
            continue
        checked += 1
        if everything or found.health.state not in OVER:
            rows.append(row(found))
        if found.health.state not in OVER:
            verdicts.append(found.health.verdict)
            findings += [finding for finding in found.health.findings if finding.verdict is not Verdict.PASS]
    verdict = worst([Verdict.PASS, *verdicts])
    coverage = Coverage(checked, len(place.names()))
    hint = [] if rows else ["no job runs here"]
    out.emit(
        Envelope("tpctl.ps", verdict, {"root": str(place.jobs_root()), "jobs": rows}, tuple(findings), coverage),
        [Table(COLUMNS, rows)],
        hint,
    )
    raise typer.Exit(int(for_verdict(verdict)))
