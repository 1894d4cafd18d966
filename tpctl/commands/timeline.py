"""`tpctl timeline RUN|JOB`: when everything happened, as a trace for Perfetto and as a picture of the overlap."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.measures import GATE, STRAGGLES, TRACKS
from tpctl import options
from tpctl.exitcodes import for_verdict
from tpctl.matrix.ppgates import SEND_AFTER_DECODE
from tpctl.output import Column, Envelope, Output, Table
from tpctl.target import TargetArgument, find_target
from tpctl.trace.events import counts
from tpctl.trace.files import TIMELINE, write_picture, write_trace
from tpctl.trace.run import RankLine, Run, read_run
from tpctl.trace.stages import STAGES, Stages
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
SHOW = "tpctl runbook show"
COLUMNS = [
    Column("rank", "rank", right=True),
    Column("role", "role"),
    Column("chunks", "chunks", right=True),
    Column("slices", "slices", right=True),
    Column("commitments", "commitments", right=True),
    Column("clock off by ms", "shift_ms", right=True),
    Column("+/- ms", "shift_error_ms", narrow=False, right=True),
    Column("host", "host", narrow=False),
]


@options.command(
    app,
    epilog="Examples: tpctl timeline RUN | tpctl timeline RUN --svg overlap.svg | "
    "tpctl timeline JOB --out job.json --last 50 | tpctl timeline RUN -o json",
)
def timeline(
    out: Output,
    target: TargetArgument,
    to: Annotated[
        Path | None,
        typer.Option("--out", help="The trace; default: timeline.json in the run directory.", metavar="FILE"),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the overlap.", metavar="FILE")] = None,
    last: Annotated[int, typer.Option("--last", min=0, help="Only so many of the last chunks; 0 is all.")] = 0,
) -> None:
    """Write a run's timeline as a trace that opens in Perfetto (ui.perfetto.dev), and its overlap as a picture."""
    chosen = find_target(target)
    run = read_run(chosen.run_dir, last)
    path = to or chosen.run_dir / TIMELINE
    title = f"{chosen.name}: {run.tp_plan or 'unknown plan'}"
    made = write_trace(run, title, path)
    if svg is not None:
        write_picture(run, title, svg)
    rows = [_row(line) for line in run.ranks]
    found = _findings(run)
    verdict = worst([Verdict.PASS, *(finding.verdict for finding in found)])
    coverage = Coverage(sum(not line.problems and bool(line.chunks) for line in run.ranks), len(run.ranks))
    data: dict[str, Any] = {
        "run_dir": str(chosen.run_dir),
        "tp_plan": run.tp_plan,
        "alive": run.alive,
        "trace": str(path),
        "svg": str(svg) if svg is not None else None,
        "events": counts(made["traceEvents"]),
        "ranks": rows,
        "overlap": run.overlap.to_dict() if run.overlap is not None else None,
        "stages": run.stages.to_dict() if run.stages is not None else None,
        "slowest": run.stages.slowest if run.stages is not None else None,
        "straggler": asdict(run.straggler) if run.straggler is not None else None,
    }
    words = [f"{path}: {', '.join(f'{count} {what}' for what, count in data['events'].items())}"]
    words += [f"{svg}: the overlap of the stages"] if svg is not None else []
    words += [_of_stages(run.stages)] if run.stages is not None else []
    words += [f"{finding.verdict}  {finding.message}" for finding in found]
    steps = tuple(dict.fromkeys(finding.next for finding in found if finding.next))
    envelope = Envelope("tpctl.timeline", verdict, data, tuple(found), coverage, steps, chosen.name)
    out.emit(envelope, [Table(COLUMNS, rows)], words)
    raise typer.Exit(int(for_verdict(verdict)))


def _row(line: RankLine) -> dict[str, Any]:
    known = line.shift.error_ns is not None
    return {
        "rank": line.rank,
        "role": line.role,
        "host": line.host,
        "alive": line.alive,
        "chunks": line.chunks,
        "slices": len(line.bars),
        "commitments": len(line.commitments),
        "shift_ms": line.shift.by_ns / 1e6 if known else None,
        "shift_error_ms": line.shift.error_ns / 1e6 if line.shift.error_ns is not None else None,
        "problems": list(line.problems),
    }


def _of_stages(spent: Stages) -> str:
    times = ", ".join(f"{stage} {spent.times_ms[stage]:.0f}" for stage in STAGES)
    return f"a period takes {spent.period_ms:.0f} ms, most of it to {spent.slowest}: {times} ms"


def _findings(run: Run) -> list[Finding]:
    """What is missing from the timeline, how sure its clocks are, and what slows the stream."""
    again = f"tpctl triage {run.run_dir}"
    found = [Finding("timeline.run", Verdict.UNKNOWN, text, next=again) for text in run.problems]
    for line in run.ranks:
        where = f"rank {line.rank}"
        found += [Finding("timeline.rank", Verdict.UNKNOWN, text, where=where, next=again) for text in line.problems]
        if not line.chunks and not line.problems:
            words = f"{where} left no chunk: only its states and commitment points are drawn"
            found.append(Finding("timeline.rank", Verdict.UNKNOWN, words, where=where))
        if line.shift.error_ns is None:
            words = f"nothing binds the clock of {where} ({line.host}) to rank 0's: its times may be off by anything"
            found.append(Finding("timeline.clock", Verdict.UNKNOWN, words, where=where))
        elif line.shift.estimated:
            words = (
                f"{where} has a clock of its own ({line.host}): moved by {line.shift.by_ns / 1e6:.3f} ms, "
                f"+/- {line.shift.error_ns / 1e6:.3f} ms, so that no message arrives before it was sent"
            )
            found.append(Finding("timeline.clock", Verdict.WARN, words, line.shift.by_ns / 1e6, where=where))
    if run.overlap is not None and run.overlap.score < GATE:
        words = f"OverlapScore {run.overlap.score:.2f}, below {GATE}: the shorter stage is not hidden"
        score = run.overlap.score
        found.append(Finding("timeline.overlap", Verdict.WARN, words, score, GATE, next=f"{SHOW} overlap-collapsed"))
    if run.held_back is not None and run.held_back.found:
        held = run.held_back
        words = f"envelopes are held back until the chunk before them is decoded: {held.sentence()}"
        step = f"{SHOW} overlap-collapsed"
        found.append(Finding(SEND_AFTER_DECODE, Verdict.WARN, words, held.tracks, TRACKS, next=step))
    if (slow := run.straggler) is not None:
        where = f"rank {slow.rank}"
        step = f"{SHOW} slow-period"
        found.append(
            Finding("timeline.straggler", Verdict.WARN, slow.sentence(), slow.share, STRAGGLES, where=where, next=step)
        )
    if run.stages is not None and run.stages.slowest == "sink":
        words = f"the stream waits for its sinks, {run.stages.times_ms['sink']:.0f} ms a chunk"
        found.append(Finding("timeline.sink", Verdict.WARN, words, next=f"{SHOW} slow-period"))
    if run.alive:
        words = "the run still goes on: the timeline ends with this moment"
        found.append(Finding("timeline.run", Verdict.WARN, words))
    return found
