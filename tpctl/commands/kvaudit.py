"""`tpctl kv-audit`: have all ranks kept the same cache history? Of a job that is gone, or of one that runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from tpctl import options
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.follow import RunRecords
from tpctl.kvaudit import Auditor
from tpctl.matrix.observation import read_reports
from tpctl.output import Column, Envelope, Format, Output, Table
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
POLL_S = 0.1
ANSWER = {Verdict.PASS: "consistent", Verdict.FAIL: "diverged"}


@app.command(epilog="Examples: tpctl kv-audit RUN | tpctl kv-audit RUN -o json | tpctl kv-audit RUN --live")
def kv_audit(
    run_dir: Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN_DIR")],
    live: Annotated[bool, typer.Option("--live", help="Follow the job until it ends.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="With --live: seconds at most; 0 is no limit.")] = 0.0,
    output: options.OutputOption = Format.table,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Compare the cache history of all ranks; name the first chunk, field, layer and rank that diverged."""
    out = Output.open(output, quiet, no_color, debug)
    records = RunRecords(run_dir)
    records.poll()
    job, late = records.settle(), False
    auditor = Auditor(records.expected_ranks)
    _feed(records, auditor, out)
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    while live and (alive := records.alive()):
        if late := alive and time.monotonic() >= deadline:
            break
        # The job's files are another process' business: there is no event to wait for.
        threading.Event().wait(POLL_S)
        records.poll()
        job = records.settle()
        auditor.ranks = max(auditor.ranks, records.expected_ranks)
        _feed(records, auditor, out)
    if live:
        records.poll()  # what came between the last look and the end
        _feed(records, auditor, out)
    for found in auditor.close():
        out.stream("divergence", found.to_dict())
    envelope = judge(records, auditor, job, live)
    data = envelope.data
    columns = [Column(name, name) for name in ("rank", "chunks", "ended", "problem")]
    words = f"{data['answer']}  {envelope.coverage.checked} of {envelope.coverage.expected} chunk records compared"
    out.emit(envelope, [Table(columns, data["ranks"])], [words, *(finding.message for finding in envelope.findings)])
    code = for_verdict(envelope.verdict)
    raise typer.Exit(int(ExitCode.DEADLINE if late and code is not ExitCode.CHECK_FAILED else code))


def _feed(records: RunRecords, auditor: Auditor, out: Output) -> None:
    for rank, one in records.ranks.items():
        if one.problem is None:
            for row in one.new:
                for found in auditor.add(rank, row):
                    out.stream("divergence", found.to_dict())
                    out.say(found.sentence())


def judge(records: RunRecords, auditor: Auditor, job: str | None, live: bool) -> Envelope:
    """The answer: a difference is proof whatever is missing; without one, whatever is missing leaves it open."""
    reports = read_reports(records.run_dir)
    ranks, findings = [], []
    known = [len(report["chunks"]) for report in reports.values() if report.get("exit_code") is not None]
    for rank in range(auditor.ranks):
        one, report = records.ranks.get(rank), reports.get(rank, {})
        ended = report.get("exit_code") is not None
        problem = one.problem if one else f"rank {rank} has no chunk records"
        if one and problem is None and one.reader.torn:
            problem = f"the last line of rank {rank} is torn"
        if one and problem is None and not ended:
            problem = f"rank {rank} left no report of its end: what it did last is not proved"
        if one and problem is None and auditor.rows[rank] < len(report["chunks"]):
            problem = f"rank {rank} reports {len(report['chunks'])} chunks, {auditor.rows[rank]} are recorded"
        if problem:
            findings.append(Finding("kv.coverage", Verdict.UNKNOWN, problem, where=f"rank {rank}"))
        ranks.append({"rank": rank, "chunks": auditor.rows[rank], "ended": ended, "problem": problem})
    first = auditor.first
    if first is not None:
        diff = Finding(
            "kv.divergence",
            Verdict.FAIL,
            f"first divergence: {first.sentence()}",
            value={str(rank): value for rank, value in first.by_rank.items()},
            where=f"rank {', '.join(map(str, first.odd))}" if first.odd else None,
            next=f"tpctl triage {records.run_dir}",
            evidence={"differences": auditor.differences},
        )
        findings.insert(0, diff)
    coverage = Coverage(auditor.compared, max(auditor.expected(max(known, default=0)), auditor.compared))
    if auditor.ranks < 2 or coverage.checked < coverage.expected or not coverage.checked:
        why = "one rank has nobody to differ from" if auditor.ranks < 2 else "not every chunk record met its equals"
        said = f"{coverage.checked} of {coverage.expected} chunk records compared: {why}"
        findings.append(Finding("kv.coverage", Verdict.UNKNOWN, said, coverage.checked, coverage.expected))
    verdict = worst([Verdict.PASS, *(finding.verdict for finding in findings)])
    data = {
        "job": job,
        "mode": "live" if live else "offline",
        "answer": ANSWER.get(verdict, "indeterminate"),
        "ranks": ranks,
        "keys": auditor.keys,
        "values": auditor.values,
        "differences": auditor.differences,
        "first": first.to_dict() if first else None,
        "divergences": [found.to_dict() for found in auditor.divergences],
    }
    steps = () if verdict is Verdict.PASS else (f"tpctl triage {records.run_dir}",)
    return Envelope("tpctl.kv-audit", verdict, data, tuple(findings), coverage, steps, records.run_dir.name)
