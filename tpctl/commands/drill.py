"""`tpctl drill`: break a real job on purpose, and judge how it dies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tpctl import complete, options
from tpctl.drill import table
from tpctl.drill.judge import Result
from tpctl.drill.ranks import Nursery
from tpctl.drill.runner import DrillRunner
from tpctl.drill.table import Drill
from tpctl.exitcodes import for_verdict
from tpctl.matrix.runner import make_assets
from tpctl.output import Column, Envelope, Output, Table, to_json
from tpctl.rundir import new_run_dir
from tpctl.verdict import Coverage, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    epilog="Examples: tpctl drill --list | tpctl drill OM-11 | tpctl drill OM-21 OM-25 -o json | "
    "tpctl drill OM-12 --without-guard | tpctl drill standard",
)
def drill(
    out: Output,
    given: options.Given,
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            help="Drills; OM-21: all its variants; standard: the four. None: all.", autocompletion=complete.drills
        ),
    ] = None,
    without_guard: Annotated[
        bool, typer.Option("--without-guard", help="The proof run: the guard is off, and the drill must fail.")
    ] = False,
    list_drills: Annotated[bool, typer.Option("--list", help="List the drills and leave.")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Default: runs/<UTC time>-drill.", metavar="DIR")
    ] = None,
) -> None:
    """Break a real job in one way and check that it dies fast, for the named reason, with nothing left behind."""
    chosen = table.select(table.load(), ids or ())
    if list_drills:
        print_list(out, chosen)
        return
    base = given.resolve().config
    directory = new_run_dir(run_dir, "drill").resolve()
    out.say(f"run directory: {directory}")
    make_assets(base, directory)
    results: list[Result] = []
    with Nursery(directory / "nursery.log") as nursery:
        runner = DrillRunner(nursery, base, directory)
        for item in chosen:
            results.append(runner.run(item, without_guard=without_guard))
            out.say(f"{results[-1].verdict}  {item.id}  {item.title}")
        if table.STANDARD_NAME in (ids or ()) and not without_guard:
            proof = next(item for item in chosen if item.id == table.STANDARD_PROOF)
            results.append(DrillRunner(nursery, base, directory / "proof").run(proof, without_guard=True))
            out.say(f"{results[-1].verdict}  {proof.id}  without its guard: {results[-1].facts.get('ended_by')}")
    envelope = envelope_of(results, directory, without_guard)
    (directory / "result.json").write_text(to_json(envelope.to_dict(), indent=2) + "\n", encoding="utf-8")
    out.emit(envelope, [table_of(results, without_guard)], explain(results, envelope))
    raise typer.Exit(int(for_verdict(envelope.verdict)))


def envelope_of(results: list[Result], directory: Path, without_guard: bool) -> Envelope:
    findings = tuple(
        replace(finding, where=result.seen.drill.id)
        for result in results
        for finding in result.findings
        if finding.verdict is not Verdict.PASS
    )
    answers = [finding.verdict for result in results for finding in result.findings]
    bad = [result for result in results if result.verdict is not Verdict.PASS]
    flag = " --without-guard" if without_guard else ""
    steps = tuple(f"tpctl drill {result.seen.drill.id}{flag} -o wide" for result in bad[:3])
    data = {
        "run_dir": str(directory),
        "without_guard": without_guard,
        "drills": [result.to_dict() for result in results],
    }
    verdict = worst(result.verdict for result in results)
    return Envelope("tpctl.drill", verdict, data, findings, Coverage.of(answers), steps, directory.name)


def table_of(results: list[Result], without_guard: bool) -> Table:
    rows = []
    for result in results:
        row = result.to_dict()
        if row["ended_by"] and not without_guard:
            row["blame"] = f"no guard: {row['ended_by']}"
        row["exit_codes"] = " ".join(f"{rank}:{code}" for rank, code in row["exit_codes"].items())
        rows.append(row)
    columns = [
        Column("drill", "id"),
        Column("verdict", "verdict"),
        Column("exit codes", "exit_codes"),
        Column("first", "first_rank", right=True),
        Column("code", "code"),
        Column("fm", "fm"),
        Column("ended by" if without_guard else "blame", "ended_by" if without_guard else "blame"),
        Column("first ms", "first_failure_ms", right=True),
        Column("gone ms", "gone_ms", right=True),
        Column("plan", "plan", narrow=False),
        Column("what", "title", narrow=False),
        Column("reason", "reason", narrow=False),
    ]
    return Table(columns, rows)


def explain(results: list[Result], envelope: Envelope) -> list[str]:
    lines = []
    for result in results:
        bad = [finding for finding in result.findings if finding.verdict is not Verdict.PASS]
        if bad:
            lines += ["", f"{result.seen.drill.id}: {result.seen.drill.title}  {result.seen.run_dir}"]
            lines += [f"  {finding.id}: {finding.message}; wanted {finding.limit}" for finding in bad]
    passed = sum(result.verdict is Verdict.PASS for result in results)
    lines += ["", f"{envelope.verdict}  {passed} of {len(results)} drills"]
    return [*lines, *(f"next: {step}" for step in envelope.next)]


def print_list(out: Output, drills: tuple[Drill, ...]) -> None:
    rows = [
        {
            "id": d.id,
            "title": d.title,
            "plan": d.plan,
            "where": d.where,
            "code": list(d.code),
            "fm": d.fm,
            "proof": d.proof,
        }
        for d in drills
    ]
    columns = [
        Column("drill", "id"),
        Column("breaks", "title"),
        Column("plan", "plan", narrow=False),
        Column("where", "where", narrow=False),
        Column("code", "code"),
        Column("fm", "fm"),
        Column("without guard", "proof"),
    ]
    out.emit(Envelope("tpctl.drill-list", Verdict.PASS, {"drills": rows}), [Table(columns, rows)])
