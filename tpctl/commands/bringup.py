"""`tpctl bringup`: run a matrix, gate each case, report."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import EngineConfig
from tpctl import complete, options
from tpctl.errors import CliError
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.launch.local import check_endpoint
from tpctl.matrix import baseline as baselines
from tpctl.matrix import report
from tpctl.matrix.cases import DEFAULT_LEVEL, Matrix, builtin, load_matrix
from tpctl.matrix.html import render
from tpctl.matrix.progress import watcher
from tpctl.matrix.runner import CaseResult, Runner, make_assets
from tpctl.output import Column, Envelope, Output, Table, to_json
from tpctl.rundir import new_run_dir
from tpctl.verdict import Coverage, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@options.command(
    app,
    epilog="Examples: tpctl bringup | tpctl bringup --list | tpctl bringup --level 1 -o json | "
    "tpctl bringup --case v1.1c-tp2 -o wide | tpctl bringup --junit bringup.xml --baseline runs/LAST | "
    "tpctl bringup --level 1 --html bringup.html | tpctl bringup --level 3 --case 'O-*' --list",
)
def bringup(
    out: Output,
    given: options.Given,
    level: Annotated[
        int, typer.Option("--level", min=1, max=3, help="1 seconds, 2 all plans, 3 sweeps.")
    ] = DEFAULT_LEVEL,
    matrix: Annotated[
        Path | None, typer.Option("--matrix", help="A matrix file, in place of a level.", metavar="FILE")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            help="Only this case, and those it needs; repeatable; O-* stands for all that it matches.",
            metavar="ID",
            autocompletion=complete.cases,
        ),
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first case that is not healthy.")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Default: runs/<UTC time>-bringup.", metavar="DIR")
    ] = None,
    rdzv_endpoint: Annotated[
        str, typer.Option("--rdzv-endpoint", help="Where ranks meet; port 0 takes a free one.", metavar="HOST:PORT")
    ] = "localhost:0",
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write JUnit XML.", metavar="FILE")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write one HTML page.", metavar="FILE")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Compare with a run directory, file or name.", metavar="RUN")
    ] = None,
    save_baseline: Annotated[
        str | None, typer.Option("--save-baseline", help="Keep this run's figures.", metavar="NAME|FILE")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases and leave.")] = False,
    strict: options.StrictOption = False,
) -> None:
    """Run a bring-up matrix on real processes, gate each case, and report; all cases run even if one fails."""
    chosen = builtin(level) if matrix is None else load_matrix(matrix)
    chosen = chosen.select(case) if case else chosen
    if list_cases:
        print_list(out, chosen)
        return
    check_endpoint(rdzv_endpoint)
    base = given.resolve().config
    base = replace(base, plan=replace(base.plan, tp=1))
    reference = baselines.read(baseline) if baseline else None
    for path in (junit, html):
        if path is not None and not path.resolve().parent.is_dir():
            raise CliError(f"cannot write {path}: its directory does not exist", next_step=f"mkdir -p {path.parent}")
    directory = new_run_dir(run_dir, "bringup")
    out.say(f"run directory: {directory}")
    if any(item.kind == "drill" or (item.kind == "run" and item.expect == "pass") for item in chosen.cases):
        out.say("making weights and tokenizer, where they are not there yet")
        make_assets(base, directory)
    here = baselines.key()
    results, interrupted = run_all(out, chosen, base, directory, rdzv_endpoint, fail_fast)
    if reference is not None:
        results = [with_baseline(result, reference, here) for result in results]
    envelope = envelope_of(chosen, results, directory, here)
    (directory / "result.json").write_text(to_json(envelope.to_dict(), indent=2) + "\n", encoding="utf-8")
    if junit is not None:
        report.write_junit(results, junit, f"tpctl bringup: {chosen.title}")
    if html is not None:
        html.write_text(render(envelope.to_dict(), html), encoding="utf-8")
        out.say(f"wrote {html}")
    if save_baseline:
        kept = baselines.save(save_baseline, envelope.data["cases"])
        out.say(f"saved the baseline {kept}")
    out.emit(envelope, [report.table(results)], closing(envelope, results, directory))
    raise typer.Exit(int(ExitCode.INTERRUPTED if interrupted else exit_code(results, strict)))


def exit_code(results: list[CaseResult], strict: bool) -> ExitCode:
    """The worst of all cases. DEADLINE only if no other case failed for a reason of its own."""
    verdict = worst(result.verdict for result in results)
    late = [result for result in results if result.timed_out]
    failed = [result for result in results if result.verdict is Verdict.FAIL and not result.timed_out]
    if late and not failed:
        return ExitCode.DEADLINE
    return for_verdict(verdict, strict)


def run_all(
    out: Output, matrix: Matrix, base: EngineConfig, directory: Path, endpoint: str, fail_fast: bool
) -> tuple[list[CaseResult], bool]:
    """All results, and whether somebody interrupted. SIGTERM ends a bring-up as Ctrl-C does: nothing stays behind."""
    results: list[CaseResult] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with watcher(out, len(matrix.cases)) as watch:
            runner = Runner(base, directory, watch, endpoint, fail_fast)
            try:
                runner.run(matrix, results)
            except KeyboardInterrupt:
                out.complain("interrupted: the processes of the running case are gone")
                rest = matrix.cases[len(results) :]
                return [*results, *(runner.not_run(item, "interrupted") for item in rest)], True
    finally:
        signal.signal(signal.SIGTERM, before)
    return results, False


def with_baseline(result: CaseResult, reference: dict[str, Any], here: dict[str, str]) -> CaseResult:
    if not result.metrics.get("period_p50_ms"):
        return result
    found = baselines.compare(result.case.id, result.metrics, reference, here)
    return replace(result, findings=(*result.findings, *found))


def envelope_of(matrix: Matrix, results: list[CaseResult], directory: Path, here: dict[str, str]) -> Envelope:
    verdict = worst(result.verdict for result in results)
    coverage = Coverage(sum(r.coverage.checked for r in results), sum(r.coverage.expected for r in results))
    bad = [result for result in results if result.verdict not in (Verdict.PASS, Verdict.WARN)]
    steps: list[str] = []
    for result in bad[:3]:
        if result.cause is not None and result.cause.next:
            steps.append(result.cause.next)
        steps.append(f"tpctl bringup{matrix.flag} --case {result.case.id} -o wide")
    data = {
        "matrix": matrix.title,
        "run_dir": str(directory),
        "host": here,
        "cases": [result.to_dict() for result in results],
    }
    findings = tuple(
        replace(finding, where=result.case.id)
        for result in results
        for finding in result.findings
        if finding.verdict not in (Verdict.PASS, Verdict.SKIP)
    )
    return Envelope("tpctl.bringup", verdict, data, findings, coverage, tuple(dict.fromkeys(steps)), directory.name)


def closing(envelope: Envelope, results: list[CaseResult], directory: Path) -> list[str]:
    passed = sum(result.verdict is Verdict.PASS for result in results)
    cover = envelope.coverage
    remarks = report.remarks(results)
    lines = [
        *(["", *remarks] if remarks else []),
        *report.explain(results),
        "",
        f"{envelope.verdict}  {passed} of {len(results)} cases, {cover.checked} of {cover.expected} gates  {directory}",
    ]
    return [*lines, *(f"next: {step}" for step in envelope.next)]


def print_list(out: Output, matrix: Matrix) -> None:
    rows = [
        {
            "id": item.id,
            "plan": item.plan,
            "tp": item.tp,
            "chunks": item.chunks,
            "reference": item.reference,
            "gates": list(item.gates) or [item.kind],
            "title": item.title,
        }
        for item in matrix.cases
    ]
    columns = [
        Column("case", "id"),
        Column("plan", "plan", narrow=False),
        Column("tp", "tp", right=True),
        Column("chunks", "chunks", right=True),
        Column("reference", "reference", narrow=False),
        Column("what", "title"),
        Column("gates", "gates", narrow=False),
    ]
    data = {"matrix": matrix.title, "cases": rows}
    out.emit(Envelope("tpctl.bringup-list", Verdict.PASS, data), [Table(columns, rows, matrix.title)])
