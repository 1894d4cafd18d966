"""`tpctl runbook list|show|run|test`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tpctl import complete, options
from tpctl.books.cause import Causes
from tpctl.books.execute import Commands
from tpctl.books.perform import Done, perform
from tpctl.books.place import BookError
from tpctl.books.rehearse import Rehearsal, given
from tpctl.books.runbook import Block, Runbook, all_ids, load, load_all
from tpctl.exitcodes import for_verdict
from tpctl.jobs import place
from tpctl.jobs.view import look
from tpctl.output import Column, Envelope, Output, Table
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="On-call runbooks: every block runs."
)
NameArgument = Annotated[
    str, typer.Argument(help="The runbook or card.", metavar="ID", autocompletion=complete.runbooks)
]


@options.command(app, "list", epilog="Examples: tpctl runbook list | tpctl runbook list -o json")
def list_runbooks(out: Output) -> None:
    """List the runbooks, and the cards of background behind them."""
    rows = [
        {
            "id": one.id,
            "title": one.title,
            "kind": "card" if one.is_card else "runbook",
            "failure_modes": list(one.failure_modes),
            "codes": list(one.codes),
            "drill": one.drill or None,
            "blocks": len(one.blocks),
        }
        for one in load_all()
    ]
    columns = [
        Column("runbook", "id"),
        Column("blocks", "blocks", right=True),
        Column("title", "title"),
        Column("for", "failure_modes"),
        Column("codes", "codes", narrow=False),
        Column("drill", "drill", narrow=False),
    ]
    step = "tpctl runbook show rank-lost"
    out.emit(Envelope("tpctl.runbook-list", Verdict.PASS, {"runbooks": rows}, next=(step,)), [Table(columns, rows)])


@options.command(app, epilog="Examples: tpctl runbook show rank-lost | tpctl runbook show cards/collectives -o json")
def show(out: Output, name: NameArgument) -> None:
    """Show one runbook."""
    one = load(name)
    data = {
        "id": one.id,
        "title": one.title,
        "failure_modes": list(one.failure_modes),
        "codes": list(one.codes),
        "drill": one.drill or None,
        "sections": dict(one.sections),
        "blocks": [_block_row(block) for block in one.blocks],
    }
    step = f"tpctl runbook run {name}"
    out.emit(Envelope("tpctl.runbook", Verdict.PASS, data, next=(step,)), text=one.text.rstrip().splitlines())


def _block_row(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "section": block.section,
        "command": block.command,
        "changes": block.changes,
        "expect": block.expect.words if len(block.expect.exit) < 256 else "any exit code",
    }


@options.command(
    app,
    epilog="Examples: tpctl runbook run rank-lost --run RUN --section Diagnosis | "
    "tpctl runbook run drain-stuck --job JOB | tpctl runbook run restore --job JOB --block state --yes",
)
def run(
    out: Output,
    name: NameArgument,
    job: Annotated[str | None, typer.Option("--job", help="What {job} stands for.", metavar="JOB")] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="What {run} stands for; the job's last attempt, if a job is given.", metavar="DIR"),
    ] = None,
    section: Annotated[
        list[str] | None, typer.Option("--section", help="Only this section's blocks; repeatable.", metavar="NAME")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option("--block", help="Only this block; repeatable.", metavar="NAME")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run also what changes something, and do not ask.")] = False,
) -> None:
    """Run a runbook's blocks, one at a time. What changes something is asked for; without a terminal it is left out."""
    one = load(name)
    chosen = _choose(one, section or [], block or [])
    commands = Commands(_given(job, run))
    done = perform(
        one.id,
        chosen,
        commands,
        allowed=lambda item, line: yes or (sys.stdin.isatty() and typer.confirm(f"Run: {line}?", err=True)),
        before=lambda item, line: out.say(f"\n[{item.section}] {item.name}\n$ {line}"),
        after=lambda result: _tell(out, result),
    )
    verdict = worst(result.verdict for result in done)
    _finish(out, "tpctl.runbook-run", {"id": one.id, "job": job, "run": str(run) if run else None}, done, verdict)


def _choose(one: Runbook, sections: list[str], names: list[str]) -> list[Block]:
    """The blocks of these sections, or of these names.

    Raises:
        BookError: a section or name that the page has not.
    """
    for kind, wanted, known in (
        ("section", sections, sorted(one.sections)),
        ("block", names, [item.name for item in one.blocks]),
    ):
        if unknown := [word for word in wanted if word not in known]:
            words = f"runbook {one.id} has no {kind} '{unknown[0]}'; it has: {', '.join(known)}"
            raise BookError(words, code="TP-8111", next_step=f"tpctl runbook show {one.id}")
    return [
        item for item in one.blocks if (not sections and not names) or item.section in sections or item.name in names
    ]


def _given(job: str | None, run: Path | None) -> dict[str, str]:
    if job is not None and run is None:
        run = look(place.find(job)).seen.run_dir
    return given(job, run.resolve() if run is not None else None)


def _tell(out: Output, done: Done) -> None:
    if done.ran is not None:
        out.say((done.ran.stdout + done.ran.stderr).rstrip())
    out.say(f"{done.verdict}  {done.block.name}: {done.message}")


@options.command(app, "test", epilog="Examples: tpctl runbook test | tpctl runbook test rank-lost -o json")
def rehearse(
    out: Output,
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="Runbooks and cards; none: all.", metavar="ID", autocompletion=complete.runbooks),
    ] = None,
    drills: Annotated[
        Path | None,
        typer.Option("--drills", help="Take what 'tpctl drill' left here; run what is missing.", metavar="DIR"),
    ] = None,
) -> None:
    """Rehearse runbooks: cause each failure with its drill, run every block of the page, check its links."""
    books = [load(name) for name in ids or all_ids()]
    with tempfile.TemporaryDirectory(prefix="tpctl-", ignore_cleanup_errors=True) as root:
        causes = Causes(Path(root), drills.resolve() if drills else None)
        rehearsal = Rehearsal(causes, lambda done: out.say(f"{done.verdict}  {done.runbook}  {done.block.name}"))
        done = rehearsal.run(books)
    verdict = worst(result.verdict for result in done)
    _finish(out, "tpctl.runbook-test", {"runbooks": [one.id for one in books]}, done, verdict)


def _finish(out: Output, schema: str, data: dict[str, Any], done: list[Done], verdict: Verdict) -> None:
    rows = [result.to_dict() for result in done]
    findings = tuple(
        Finding(
            f"runbook.{result.block.name}",
            result.verdict,
            result.message,
            limit=result.block.expect.words if len(result.block.expect.exit) < 256 else None,
            where=result.runbook,
        )
        for result in done
        if result.verdict is not Verdict.PASS
    )
    columns = [
        Column("runbook", "runbook"),
        Column("block", "block"),
        Column("verdict", "verdict"),
        Column("exit", "exit_code", right=True),
        Column("s", "wall_s", right=True),
        Column("section", "section", narrow=False),
        Column("command", "command", narrow=False),
    ]
    passed = sum(result.verdict is Verdict.PASS for result in done)
    lines = ["", *(f"{finding.where}: {finding.id}: {finding.message}" for finding in findings)]
    lines.append(f"{verdict}  {passed} of {len(done)} blocks and pages")
    coverage = Coverage.of(result.verdict for result in done)
    out.emit(Envelope(schema, verdict, {**data, "blocks": rows}, findings, coverage), [Table(columns, rows)], lines)
    raise typer.Exit(int(for_verdict(verdict)))
