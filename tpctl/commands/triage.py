"""`tpctl triage`: who began it? Of a run that is gone, or of one that still runs."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tpctl import options
from tpctl.acts import last_acts
from tpctl.bundle import archive
from tpctl.examination import Case, alive, bundled, rank_row
from tpctl.exitcodes import for_verdict
from tpctl.failuremodes import has_runbook
from tpctl.output import Column, Envelope, Format, Output, Table, cell
from tpctl.remains import tail
from tpctl.triage import Triage
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    epilog="Examples: tpctl triage RUN | tpctl triage RUN -o wide | tpctl triage RUN -o json | tpctl triage BUNDLE",
)
def triage(
    out: Output,
    run_dir: Annotated[
        Path, typer.Argument(help="A run directory, the directory of many runs, or a bundle.", metavar="RUN_DIR|BUNDLE")
    ],
) -> None:
    """Name the rank that began it, apart from its victims; the failure mode; the runbook; what to type next."""
    with contextlib.ExitStack() as stack:
        cases = []
        for case in stack.enter_context(bundled(run_dir)) if archive.is_bundle(run_dir) else alive(run_dir):
            cases.append(case)
            out.stream("run", case.to_dict())
        show(out, run_dir, cases)


def show(out: Output, run_dir: Path, cases: list[Case]) -> None:
    """Print what was found, and exit with it."""
    envelope = envelope_of(run_dir, cases)
    failed = [case for case in cases if case.found.verdict is not Verdict.PASS]
    shown = cases if len(cases) == 1 else failed if len(failed) == 1 else []
    tables, lines = [], []
    if len(cases) > 1:
        tables.append(table_of_runs(cases))
    for case in shown:
        tables.append(table_of_ranks(case))
        if out.format is Format.wide:
            tables.append(table_of_acts(case))
        lines += explain(case)
    if not shown:
        lines += ["", *(f"{name(case)}: {case.found.sentence}" for case in failed), "", summary(cases)]
        lines += [f"next: {step}" for step in envelope.next]
    out.emit(envelope, tables, lines)
    raise typer.Exit(int(for_verdict(envelope.verdict)))


def envelope_of(root: Path, cases: list[Case]) -> Envelope:
    findings = []
    for case in cases:
        found, where = case.found, name(case)
        if found.verdict is not Verdict.PASS:
            step = next(iter(case.next()), None)
            findings.append(Finding(f"triage.{found.kind}", found.verdict, found.sentence, where=where, next=step))
        findings += [Finding("triage.coverage", Verdict.UNKNOWN, text, where=where) for text in case.problems]
    verdict = worst([case.found.verdict for case in cases])
    checked = sum(case.found.coverage.checked for case in cases)
    expected = sum(case.found.coverage.expected for case in cases)
    failed = [case for case in cases if case.found.verdict is not Verdict.PASS]
    steps = [f"tpctl triage {shlex.quote(str(case.run))}" for case in failed[:3]]
    if len(cases) == 1 or len(failed) == 1:
        steps = (failed or cases)[0].next()
    data = {"root": str(root), "runs": [case.to_dict() for case in cases]}
    return Envelope(
        "tpctl.triage", verdict, data, tuple(findings), Coverage(checked, expected), tuple(steps), root.resolve().name
    )


def table_of_ranks(case: Case) -> Table:
    rows = []
    for rank in case.seen.ranks:
        row = rank_row(rank, case.found)
        where = f"{'in' if row['inside'] else 'after'} {row['op']} {row['place']}" if row["op"] else None
        rows.append(row | {"where": where, "problem": "; ".join(row["problems"]) or None})
    columns = [
        Column("rank", "rank", right=True),
        Column("role", "role"),
        Column("state", "state"),
        Column("exit", "exit_code", right=True),
        Column("last commitment", "commitment"),
        Column("call", "call_id", right=True),
        Column("chunk", "chunk_index", right=True),
        Column("collective", "where"),
        Column("group", "group", narrow=False),
        Column("tensor", "what", narrow=False),
        Column("at", "site", narrow=False),
        Column("error", "error", narrow=False),
        Column("problem", "problem", narrow=False),
    ]
    return Table(columns, rows)


def table_of_acts(case: Case) -> Table:
    columns = [
        Column("order", "after", right=True),
        Column("rank", "rank", right=True),
        Column("act", "what"),
        Column("group", "group"),
        Column("call", "call_id", right=True),
        Column("chunk", "chunk_index", right=True),
    ]
    return Table(
        columns,
        [act.to_dict() for act in last_acts(case.seen)],
        "last acts, in the order of the collectives or calls that all ranks share",
    )


def table_of_runs(cases: list[Case]) -> Table:
    columns = [Column(word, word) for word in ("run", "verdict", "blame", "fm", "code")]
    columns += [Column(word, word, narrow=False) for word in ("kind", "words")]
    rows = [
        {
            "run": name(case),
            "verdict": case.found.verdict.value,
            "kind": case.found.kind,
            "blame": accused(case.found),
            "fm": case.found.fm,
            "words": case.found.words,
            "code": case.found.code,
        }
        for case in cases
    ]
    return Table(columns, rows)


def explain(case: Case) -> list[str]:
    """What a person reads below the table."""
    found = case.found
    mode = "  ".join(word for word in (found.fm, found.words) if word)
    lines = ["", f"{found.verdict}  {accused(found)}  {mode}".rstrip(), found.sentence]
    lines += [f"problem: {problem}" for problem in case.problems]
    if case.log is not None and (last := tail(case.log)):
        lines += [f"log: {case.inside(case.log)}", *(f"  | {line}" for line in last)]
    for stack in case.stacks:
        lines += [f"stack of rank {stack['rank']}:", *(f"  | {line}" for line in stack["lines"])]
    for record in case.flight:
        lines.append(f"flight recorder: rank {record['rank']}: {record['last']}")
    lines += [f"note: {note}" for note in case.notes]
    if found.runbook:
        lines.append(f"runbook: {found.runbook}" + ("" if has_runbook(found.runbook) else " (not in this checkout)"))
    lines.append(f"{found.coverage.checked} of {found.coverage.expected} ranks left evidence that is whole")
    return [*lines, *(f"next: {step}" for step in case.next())]


def accused(found: Triage) -> str:
    """In two words: whom the proof convicts."""
    if found.triggers:
        return f"rank{'s' if len(found.triggers) > 1 else ''} {cell(found.triggers)}"
    return f"between ranks {cell(found.parties)}" if found.parties else "nobody"


def name(case: Case) -> str:
    return case.seen.run_dir.resolve().name


def summary(cases: list[Case]) -> str:
    counts = {verdict: sum(case.found.verdict is verdict for case in cases) for verdict in Verdict}
    return f"{len(cases)} runs: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
