"""`tpctl logs RUN|JOB`: what all ranks, the supervisor, the launcher and the referee said, in one order."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import typer

from engine.log import Level
from tpctl import options
from tpctl.errors import CliError
from tpctl.exitcodes import ExitCode, for_verdict
from tpctl.jobs.record import JobRecord
from tpctl.logs.entry import Entry, Origin
from tpctl.logs.merge import Merger
from tpctl.logs.run import TOLD, RunLogs
from tpctl.output import Envelope, Format, Output
from tpctl.target import Target, TargetArgument, find_target
from tpctl.verdict import Coverage, Finding, Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)
POLL_S = 0.1
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
STYLES = {Level.warning: "\x1b[33m", Level.error: "\x1b[1;31m", Level.debug: "\x1b[2m"}
RESET = "\x1b[0m"


@dataclass(frozen=True)
class Filter:
    """Which lines are shown. A line without a time is as old as the one before it in its log."""

    level: Level
    since_s: float | None

    def shown(self, entries: list[Entry]) -> Iterator[Entry]:
        for entry in entries:
            old = self.since_s is not None and (entry.unix_s is None or entry.unix_s < self.since_s)
            if entry.level.weight >= self.level.weight and not old:
                yield entry


@options.command(
    app,
    epilog="Examples: tpctl logs JOB | tpctl logs JOB --follow | tpctl logs JOB --rank 1 --since 5m | "
    "tpctl logs JOB --level warning -o jsonl | tpctl logs RUN --origin stderr",
)
def logs(
    out: Output,
    target: TargetArgument,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", min=0, help="Only this rank's lines; repeatable.", metavar="N")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", help="A time of day in ISO 8601, or how long ago: 90s, 5m, 2h.", metavar="T"),
    ] = None,
    level: Annotated[Level, typer.Option("--level", help="The least level that is shown.")] = Level.debug,
    origin: Annotated[
        list[Origin] | None, typer.Option("--origin", help="Whose lines; repeatable. All but stderr if not given.")
    ] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Only so many of the last lines; 0 is all.")] = 0,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=0, help="Of a job: this attempt, not the last.", metavar="N")
    ] = None,
) -> None:
    """Show the logs of a run, merged: never two lines of one rank swapped, and cause before effect across ranks."""
    chosen = Filter(level, parse_since(since, time.time()))
    found = find_target(target, attempt)
    how = (frozenset(rank) if rank else None, frozenset(origin or TOLD))
    reading = RunLogs(found, *how)
    teller = Teller(out, lines)
    interrupted = False
    try:
        merger = _merger()
        teller.tell(chosen.shown(merger.take(reading.poll(), time.monotonic_ns() if follow else None)), lines)
        while follow:
            over, now_ns = reading.over(), time.monotonic_ns()  # before the poll, which reads what came until then
            teller.tell(chosen.shown(merger.take(reading.poll(), None if over else now_ns)))
            if over:
                following = following_attempt(found) if attempt is None else None
                if following is None:
                    break
                found, merger = following, _merger()
                reading = RunLogs(found, *how)
            else:
                threading.Event().wait(POLL_S)  # files of other processes: there is no event to wait for
    except KeyboardInterrupt:
        interrupted = True
    envelope = _envelope(reading, found, teller)
    if teller.plain:
        for finding in envelope.findings:
            out.say(f"{finding.verdict}  {finding.message}")
    else:
        out.emit(envelope)
    raise typer.Exit(int(ExitCode.INTERRUPTED if interrupted else for_verdict(envelope.verdict)))


class Teller:
    """Shows lines as they come or, where one document is wanted, keeps them: the last `keep`, or all if it is 0."""

    def __init__(self, out: Output, keep: int) -> None:
        self.plain = out.format in (Format.table, Format.wide)
        self.count = 0
        self.kept: deque[Entry] = deque(maxlen=keep or None)
        self._out = out
        self._colours = out.pretty(sys.stdout)

    def tell(self, entries: Iterable[Entry], last: int = 0) -> None:
        """Only the `last` ones, if it is not 0."""
        for entry in deque(entries, maxlen=last or None):
            self.count += 1
            if self.plain:
                self._print(entry)
            elif self._out.format is Format.jsonl:
                self._out.stream("log", entry.to_dict())
            else:
                self.kept.append(entry)

    def _print(self, entry: Entry) -> None:
        style = STYLES.get(entry.level) if self._colours else None
        print(f"{style}{entry.line()}{RESET}" if style else entry.line(), flush=True)


def _merger() -> Merger:
    return Merger(time.monotonic_ns() - time.time_ns())


def following_attempt(target: Target) -> Target | None:
    """The attempt that followed the one that was read to its end; None: it was the last."""
    if target.job is None or target.attempt is None:
        return None
    number = target.attempt + 1
    more = number < len(JobRecord.read(target.job.record).attempts)
    return Target(target.name, target.job.run_dir(number), target.job, number) if more else None


def parse_since(text: str | None, now_s: float) -> float | None:
    """Unix seconds. Raises CliError: neither a moment nor an age."""
    if text is None:
        return None
    age = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if age is not None:
        return now_s - float(age[1]) * UNITS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise CliError(
            f"--since must be an age like 90s, 5m, 2h, 1d, or a time like 2026-01-31T12:00:00Z, is {text!r}",
            code="TP-7810",
            next_step="tpctl logs JOB --since 5m",
        ) from error


def _envelope(reading: RunLogs, target: Target, teller: Teller) -> Envelope:
    """What is missing makes the rest no less true, but the whole is not known."""
    findings = tuple(Finding("logs.read", Verdict.UNKNOWN, text, where=name) for name, text in reading.problems)
    ranks = reading.ranks
    bad = {finding.where for finding in findings}
    coverage = Coverage(sum(f"rank {rank}" not in bad for rank in ranks), len(ranks))
    verdict = Verdict.UNKNOWN if findings else Verdict.PASS
    data = {
        "run_dir": str(target.run_dir),
        "attempt": target.attempt,
        "ranks": ranks,
        "shown": teller.count,
        "records": [entry.to_dict() for entry in teller.kept],
    }
    return Envelope("tpctl.logs", verdict, data, findings, coverage, run_id=target.name)
