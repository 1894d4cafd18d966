"""`tpctl triage`: who began it? Of a run that is gone, or of one that still runs."""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.referee.snapshot import Life
from tpctl import options
from tpctl.acts import last_acts
from tpctl.bundle import archive
from tpctl.bundle.archive import Bundle
from tpctl.evidence import LAUNCHER_LOG, RankSeen, Seen, find_runs, gather
from tpctl.exitcodes import for_verdict
from tpctl.failuremodes import FAILURE_MODES, has_runbook
from tpctl.output import Column, Envelope, Format, Output, Table, cell
from tpctl.remains import tail
from tpctl.stacks import flight_records, live_stacks
from tpctl.triage import Triage, judge
from tpctl.verdict import Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
# A live job is looked at twice, this far apart: what is proved is still so the second time.
SECOND_LOOK_S = 0.06
# What an error says to type next where it knows nothing better.
VAGUE = ("tpctl triage", "tpctl env", "the first cause")


@dataclass(frozen=True)
class Case:
    """One run directory, judged. `bundle` is the archive that it lies in; what is shown must outlive the copy."""

    seen: Seen
    found: Triage
    notes: tuple[str, ...] = ()
    stacks: tuple[dict[str, Any], ...] = ()
    flight: tuple[dict[str, Any], ...] = ()
    bundle: Path | None = None

    @property
    def run(self) -> Path:
        """What to call the run."""
        return self.bundle or self.seen.run_dir

    def inside(self, path: Path) -> str:
        """A file of the run: its path, or its name in the bundle."""
        return str(path) if self.bundle is None else str(path.relative_to(self.seen.run_dir.parents[1]))

    @property
    def speaks(self) -> int | None:
        """The rank whose log to read."""
        one = self.found.triggers or ((self.found.speaker,) if self.found.speaker is not None else ())
        return one[0] if len(one) == 1 else None

    @property
    def log(self) -> Path | None:
        rank = self.seen.of(self.speaks) if self.speaks is not None else None
        if rank is not None:
            return rank.log
        launcher = self.seen.run_dir / LAUNCHER_LOG
        return launcher if self.found.verdict is not Verdict.PASS and launcher.is_file() else None

    @property
    def problems(self) -> list[str]:
        return [*self.seen.problems, *(problem for rank in self.seen.ranks for problem in rank.problems)]

    def next(self) -> list[str]:
        """What to type, best first."""
        run, found = shlex.quote(str(self.run)), self.found
        if found.verdict is Verdict.PASS:
            return []
        if found.kind == "running":
            return [f"tpctl triage {run}"]
        steps = []
        rank = self.seen.of(found.speaker) if found.speaker is not None else None
        told = (rank.report.error or {}).get("next") if rank is not None and rank.report is not None else None
        if told and not told.startswith(VAGUE):
            steps.append(str(told))
        mode = FAILURE_MODES.get(found.fm or "")
        if mode is not None and mode.next and not steps:
            steps.append(mode.next.format(run=run))
        if found.runbook and has_runbook(found.runbook):
            steps.append(f"tpctl runbook show {found.runbook}")
        if not steps and self.log is not None:
            log = shlex.quote(self.inside(self.log))
            steps.append(f"tail -n 50 {log}" if self.bundle is None else f"tar -xOf {run} {log} | tail -n 50")
        return list(dict.fromkeys(steps)) or ["tpctl bringup --level 1"]

    def to_dict(self) -> dict[str, Any]:
        found = self.found
        return {
            "run": str(self.run),
            "job": self.seen.job,
            "alive": self.seen.alive,
            "verdict": found.verdict.value,
            "kind": found.kind,
            "sentence": found.sentence,
            "blame": found.blame,
            "triggers": list(found.triggers),
            "parties": list(found.parties),
            "victims": list(found.victims),
            "fm": found.fm,
            "words": found.words,
            "code": found.code,
            "runbook": found.runbook,
            "source": found.source,
            "coverage": {"checked": found.coverage.checked, "expected": found.coverage.expected},
            "ranks": [rank_row(rank, found) for rank in self.seen.ranks],
            "acts": [act.to_dict() for act in last_acts(self.seen)],
            "problems": self.problems,
            "notes": list(self.notes),
            "stacks": list(self.stacks),
            "flight_recorder": list(self.flight),
            "log": self.inside(self.log) if self.log else None,
            "tail": list(tail(self.log)),
            "next": self.next(),
        }


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


def alive(run_dir: Path) -> Iterator[Case]:
    """The runs of a directory, as they are now."""
    yield from map(examine, find_runs(run_dir))


@contextlib.contextmanager
def bundled(path: Path) -> Iterator[Iterator[Case]]:
    """The runs of a bundle, as they were when it was made. Their files are there while the body runs."""
    bundle = archive.read(path)
    with archive.extracted(bundle) as root:
        yield (from_bundle(bundle, root, run) for run in bundle.manifest["runs"])


def from_bundle(bundle: Bundle, root: Path, run: Mapping[str, Any]) -> Case:
    """One run of it. This host knows nothing of its processes: the manifest tells how they lived."""
    words = {life.value for life in Life}
    lives = {int(rank): Life(life) for rank, life in run["lives"].items() if life in words}
    seen = gather(root / "runs" / str(run["label"]), lives)
    seen = replace(seen, problems=(*seen.problems, *bundle.problems))
    found = judge(seen)
    made = f"as of {bundle.manifest.get('made_at')}, when the bundle was made"
    return Case(seen, found, (made,) if found.verdict is not Verdict.PASS else (), bundle=bundle.path)


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


def examine(directory: Path) -> Case:
    """Gather and judge one run. A job that lives is judged twice; what it was only for a moment is not proved."""
    seen = gather(directory)
    found = judge(seen)
    if seen.alive:
        threading.Event().wait(SECOND_LOOK_S)
        again = gather(directory)
        later = judge(again)
        moved = (later.kind, later.triggers, later.fm) != (found.kind, found.triggers, found.fm)
        seen, found = again, later
        if moved and seen.alive:
            found = Triage(Verdict.UNKNOWN, "running", "the job still runs, and moved while it was looked at")
    if found.verdict is Verdict.PASS:
        return Case(seen, found)
    stacks, no_stacks = live_stacks(seen)
    flight, no_flight = flight_records(seen)
    notes = [*no_stacks, *no_flight]
    if seen.alive:
        alive = ", ".join(str(rank.rank) for rank in seen.ranks if rank.alive)
        notes.insert(0, f"the job still lives (rank {alive}): this is its state now")
    return Case(seen, found, tuple(notes), tuple(stacks), tuple(flight))


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


def rank_row(rank: RankSeen, found: Triage) -> dict[str, Any]:
    box = rank.contents
    commit = box.commitments[-1] if box and box.commitments else None
    entry = (box.inside or (box.collectives[-1] if box.collectives else None)) if box else None
    inside = bool(box and box.inside)
    acts = [act for act in (commit, entry) if act is not None]
    call_id = max((act.call_id for act in acts), default=-1)
    chunk = max((act.chunk_index for act in acts), default=-1)
    state = box.live.state.value if box else rank.report.state if rank.report else None
    return {
        "rank": rank.rank,
        "role": found.role(rank.rank),
        "state": state,
        "life": rank.life.value if rank.life else None,
        "exit_code": rank.exit_code,
        "error": str((rank.report.error or {}).get("code")) if rank.report and rank.report.error else None,
        "commitment": commit.action if commit else None,
        "call_id": call_id if call_id >= 0 else None,
        "chunk_index": chunk if chunk >= 0 else None,
        "inside": inside,
        "op": entry.op if entry else None,
        "what": entry.what if entry else None,
        "group": entry.group if entry else None,
        "place": entry.place if entry else None,
        "site": entry.site if entry else None,
        "problems": list(rank.problems),
    }


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
