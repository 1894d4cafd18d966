"""`tpctl checklist list|show|run|verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tpctl import complete, options
from tpctl.books import record as records
from tpctl.books.checklist import Checklist, Item, Mode, load, load_all, page
from tpctl.books.execute import Commands
from tpctl.books.place import BookError
from tpctl.books.walk import Answer, Walked, keep, prepare, walk
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.output import Column, Envelope, Output, Table
from tpctl.rundir import new_run_dir
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Operator checklists: every item runs."
)


@options.command(app, "list", epilog="Examples: tpctl checklist list | tpctl checklist list -o json")
def list_checklists(out: Output) -> None:
    """List the checklists."""
    rows = [
        {
            "id": one.id,
            "title": one.title,
            "topic": one.topic,
            "mode": one.mode.value,
            "pause_point": one.pause_point,
            "items": len(one.items),
            "budget_s": one.budget_s,
        }
        for one in load_all()
    ]
    columns = [
        Column("checklist", "id"),
        Column("items", "items", right=True),
        Column("mode", "mode"),
        Column("title", "title"),
        Column("stop when", "pause_point", narrow=False),
    ]
    step = "tpctl checklist show p0"
    out.emit(Envelope("tpctl.checklist-list", Verdict.PASS, {"checklists": rows}, next=(step,)), [Table(columns, rows)])


@options.command(app, epilog="Examples: tpctl checklist show p0 | tpctl checklist show deadlocks -o json")
def show(
    out: Output,
    name: Annotated[str, typer.Argument(help="The checklist.", metavar="ID", autocompletion=complete.checklists)],
) -> None:
    """Show one checklist, on one page."""
    one = load(name)
    data = {
        "id": one.id,
        "title": one.title,
        "topic": one.topic,
        "mode": one.mode.value,
        "pause_point": one.pause_point,
        "budget_s": one.budget_s,
        "contract": list(one.contract),
        "forbidden": list(one.forbidden),
        "instrumentation": list(one.instrumentation),
        "items": [
            {
                "id": item.id,
                "text": item.text,
                "why": item.why,
                "command": item.command,
                "expect": item.expect.words,
                "tripwire": item.tripwire,
                "drill": item.drill,
                "on_fail": item.on_fail,
            }
            for item in one.items
        ],
        "sha256": records.digest(one.text),
    }
    step = f"tpctl checklist run {name}"
    out.emit(Envelope("tpctl.checklist", Verdict.PASS, data, next=(step,)), text=page(one))


@options.command(
    app,
    epilog="Examples: tpctl checklist run deadlocks --yes | tpctl checklist run --all --yes | "
    "tpctl checklist run kv-cache --yes --run runs/X",
)
def run(
    out: Output,
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="The checklists to run.", metavar="ID", autocompletion=complete.checklists),
    ] = None,
    run_all: Annotated[bool, typer.Option("--all", help="All of them; what several share is run once.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", help="Judge this run directory, not a small bring-up's.", metavar="DIR")
    ] = None,
    pp: Annotated[Path | None, typer.Option("--pp", help="The same for the items on a pp plan.", metavar="DIR")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="DO-CONFIRM: take every item as confirmed.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="Default: runs/<UTC time>-checklist.", metavar="DIR")
    ] = None,
) -> None:
    """Run every item's command, and write a record of what each answered, sealed by a chain of digests."""
    if run_all == bool(ids):
        raise BookError("name checklists, or give --all", code="TP-8108", next_step="tpctl checklist list")
    chosen = load_all() if run_all else tuple(load(name) for name in ids or ())
    by_hand = not yes and any(one.mode is Mode.do_confirm for one in chosen)
    if by_hand and not sys.stdin.isatty():
        names = ", ".join(one.id for one in chosen if one.mode is Mode.do_confirm)
        raise BookError(
            f"{names}: DO-CONFIRM asks a person after each item, and there is no terminal",
            code="TP-8109",
            next_step="the same command with --yes",
        )
    given = {name: str(path.resolve()) for name, path in (("run", run), ("pp", pp)) if path is not None}
    directory = new_run_dir(record, "checklist")
    commands = Commands(given, makes=True)
    out.say("running the drills that these items name, once for all")
    prepare(chosen, commands, directory / "drills")
    walks, rows = [], []
    for one in chosen:
        walked = _walk(out, one, commands, by_hand and one.mode is Mode.do_confirm)
        path, sealed = keep(walked, directory)
        walks.append(walked)
        rows.append(_row(walked, path, sealed))
    verdict = worst(walked.verdict for walked in walks)
    coverages = [walked.coverage for walked in walks]
    coverage = Coverage(sum(c.checked for c in coverages), sum(c.expected for c in coverages))
    findings = tuple(finding for walked in walks for finding in walked.findings())
    steps = tuple(dict.fromkeys(finding.next for finding in findings if finding.next))[:3]
    data = {"record_dir": str(directory), "checklists": rows}
    out.emit(
        Envelope("tpctl.checklist-run", verdict, data, findings, coverage, steps, directory.name),
        [_table(walks)],
        [*_explain(walks, rows), *(f"next: {step}" for step in steps)],
    )
    late = any(walked.late for walked in walks) and verdict is not Verdict.FAIL
    raise typer.Exit(int(ExitCode.DEADLINE if late else for_verdict(verdict)))


def _walk(out: Output, one: Checklist, commands: Commands, by_hand: bool) -> Walked:
    out.say(f"{one.id}: {one.title}  ({one.mode})")

    def before(item: Item) -> None:
        if one.mode is Mode.read_do:
            out.say(f"  {item.text}\n    $ {item.command}")

    def after(answer: Answer) -> None:
        out.say(
            f"  {answer.verdict}  {answer.item.id}" + ("" if answer.verdict is Verdict.PASS else f": {answer.message}")
        )

    def confirm(item: Item, answer: Answer) -> bool:
        return typer.confirm(f"  {item.text} [{answer.verdict}] Confirmed?", err=True)

    return walk(one, commands, confirm=confirm if by_hand else None, before=before, after=after)


def _row(walked: Walked, path: Path, sealed: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": walked.checklist.id,
        "title": walked.checklist.title,
        "verdict": walked.verdict.value,
        "started_at": walked.started_at,
        "ended_at": walked.ended_at,
        "record": str(path),
        "sha256": sealed["sha256"],
        "items": [answer.to_dict() for answer in walked.answers],
    }


def _table(walks: list[Walked]) -> Table:
    rows = [{**answer.to_dict(), "checklist": walked.checklist.id} for walked in walks for answer in walked.answers]
    columns = [
        Column("checklist", "checklist"),
        Column("item", "id"),
        Column("verdict", "verdict"),
        Column("s", "wall_s", right=True),
        Column("command", "command", narrow=False),
        Column("what", "message", narrow=False),
    ]
    return Table(columns, rows)


def _explain(walks: list[Walked], rows: list[dict[str, Any]]) -> list[str]:
    lines = [""]
    for walked in walks:
        for answer in walked.answers:
            if answer.verdict is not Verdict.PASS:
                lines += [
                    f"{walked.checklist.id}: {answer.item.text} {answer.item.why}",
                    f"  {answer.message}",
                    f"  $ {answer.item.command}",
                ]
    passed = sum(answer.verdict is Verdict.PASS for walked in walks for answer in walked.answers)
    total = sum(len(walked.answers) for walked in walks)
    lines.append(f"{worst(walked.verdict for walked in walks)}  {passed} of {total} items")
    return [*lines, *(f"record: {row['record']}  sha256 {row['sha256']}" for row in rows)]


@options.command(
    app,
    epilog="Examples: tpctl checklist verify runs/X/p0.toml | tpctl checklist verify runs/X/p0.toml --sha256 DIGEST",
)
def verify(
    out: Output,
    path: Annotated[Path, typer.Argument(help="A record that 'tpctl checklist run' wrote.", metavar="RECORD")],
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="The digest that was noted when the record was made.")
    ] = None,
) -> None:
    """Check that a record is as it was sealed. Only the digest that you noted yourself proves that it is the same."""
    data = records.read(path)
    wrong = records.broken(data)
    if wrong is None and sha256 is not None and data["sha256"] != sha256:
        wrong = f"the record's digest is {data['sha256']}, not the one given: it was sealed again"
    if wrong is not None:
        verdict, words = Verdict.FAIL, wrong
    elif sha256 is None:
        verdict, words = Verdict.PASS, "the chain of digests is whole; it is not compared with a noted one"
    else:
        verdict, words = Verdict.PASS, "the record is the one that was noted"
    finding = Finding("checklist.record", verdict, words, data.get("sha256"), sha256, where=str(path))
    row = {"record": str(path), "checklist": data.get("checklist"), "said": data.get("verdict"), "whole": wrong is None}
    out.emit(
        Envelope("tpctl.checklist-verify", verdict, row, (finding,)),
        text=[f"{verdict}  {path}: {words}", f"it says: {data.get('checklist')} {data.get('verdict')}"],
    )
    raise typer.Exit(int(for_verdict(verdict)))
