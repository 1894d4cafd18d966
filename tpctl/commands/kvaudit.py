"""`tpctl kv-audit`: have all ranks kept the same cache history? Of a job that is gone, or of one that runs.

With `--deep`, also the same content: recorded frames are replayed on one process, and every rank's samples are compared
with those of the replay.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from engine.config import load
from engine.errors import EngineError
from tpctl import options
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.follow import RunRecords
from tpctl.kvaudit import Auditor
from tpctl.kvdeep import ANSWER, DeepAudit, dig, table
from tpctl.kvreplay import config_path, require_frames
from tpctl.output import Column, Envelope, Output, Table
from tpctl.reports import read_reports
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
POLL_S = 0.1


@options.command(
    app,
    epilog="Examples: tpctl kv-audit RUN | tpctl kv-audit RUN -o json | tpctl kv-audit RUN --live | "
    "tpctl kv-audit RUN --deep",
)
def kv_audit(
    out: Output,
    run_dir: Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN_DIR")],
    live: Annotated[bool, typer.Option("--live", help="Follow the job until it ends.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="With --live: seconds at most; 0 is no limit.")] = 0.0,
    deep: Annotated[
        bool, typer.Option("--deep", help="Replay recorded frames on one process; compare every rank's cache with it.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="With --deep: the largest deviation, relative; 0: the dtype's own."),
    ] = 0.0,
    replay_timeout_s: Annotated[
        float, typer.Option("--replay-timeout", min=0.0, help="With --deep: seconds for the replay; 0 is no limit.")
    ] = 900.0,
) -> None:
    """Compare the cache history of all ranks; name the first chunk, field, layer and rank that diverged.

    With --deep, name the first generator call, layer, head and rank whose cached values differ from a replay's.
    """
    records = RunRecords(run_dir)
    if deep and not live:
        require_frames(run_dir)
    records.poll()
    job, late = records.settle(), False
    outside = ranks_outside(run_dir)
    auditor = Auditor(records.expected_ranks - outside)
    _feed(records, auditor, out)
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    while live and (alive := records.alive()):
        if late := alive and time.monotonic() >= deadline:
            break
        # The job's files are another process' business: there is no event to wait for.
        threading.Event().wait(POLL_S)
        records.poll()
        job = records.settle()
        auditor.ranks = max(auditor.ranks, records.expected_ranks - outside)
        _feed(records, auditor, out)
    if live:
        records.poll()  # what came between the last look and the end
        _feed(records, auditor, out)
    for found in auditor.close():
        out.stream("divergence", found.to_dict())
    dug = dig(run_dir, job, tolerance, replay_timeout_s, out) if deep else None
    late = late or (dug is not None and dug.late)
    envelope = judge(records, auditor, job, live, dug, outside)
    data = envelope.data
    columns = [Column(name, name) for name in ("rank", "chunks", "ended", "problem")]
    unit = "chunk records" if dug is None else "chunk records and (chunk, call, layer, head)"
    words = f"{data['answer']}  {envelope.coverage.checked} of {envelope.coverage.expected} {unit} compared"
    tables = [Table(columns, data["ranks"]), *([table(dug)] if dug is not None else [])]
    out.emit(envelope, tables, [words, *(finding.message for finding in envelope.findings)])
    code = for_verdict(envelope.verdict)
    raise typer.Exit(int(ExitCode.DEADLINE if late and code is not ExitCode.CHECK_FAILED else code))


def _feed(records: RunRecords, auditor: Auditor, out: Output) -> None:
    for rank, one in records.ranks.items():
        if one.problem is None:
            for row in one.new:
                for found in auditor.add(rank, row):
                    out.stream("divergence", found.to_dict())
                    out.say(found.sentence())


def ranks_outside(run_dir: Path) -> int:
    """Ranks before the mesh, which hold no cache: Stage 0's in pp. 0 where no configuration can be read."""
    with contextlib.suppress(EngineError):
        config = load([("run", config_path(run_dir))]).config
        return config.world_size - config.plan.tp
    return 0


def judge(
    records: RunRecords,
    auditor: Auditor,
    job: str | None,
    live: bool,
    deep: DeepAudit | None = None,
    outside: int = 0,
) -> Envelope:
    """The answer: a difference is proof whatever is missing; without one, whatever is missing leaves it open.

    `outside` counts the ranks before the mesh.
    """
    reports = read_reports(records.run_dir)
    ranks, findings = [], []
    known = [len(report["chunks"]) for report in reports.values() if report.get("exit_code") is not None]
    for rank in range(outside, outside + auditor.ranks):
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
    alone = auditor.ranks < 2 and deep is None  # a replay is somebody to differ from
    if alone or coverage.checked < coverage.expected or not coverage.checked:
        why = "one rank has nobody to differ from" if alone else "not every chunk record met its equals"
        said = f"{coverage.checked} of {coverage.expected} chunk records compared: {why}"
        findings.append(Finding("kv.coverage", Verdict.UNKNOWN, said, coverage.checked, coverage.expected))
    if deep is not None:
        findings += deep.findings(records.run_dir)
        coverage = Coverage(coverage.checked + deep.compared, coverage.expected + deep.expected)
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
        "deep": deep.to_dict() if deep is not None else None,
    }
    steps = () if verdict is Verdict.PASS else (f"tpctl triage {records.run_dir}",)
    return Envelope("tpctl.kv-audit", verdict, data, tuple(findings), coverage, steps, records.run_dir.name)
