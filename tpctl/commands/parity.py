"""`tpctl parity-check`: what differs between the ranks of a launch, of a run, or between hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import Loaded
from tpctl import options, snapshot
from tpctl.errors import SnapshotError
from tpctl.exitcodes import for_verdict
from tpctl.output import Column, Envelope, Format, Output, Table
from tpctl.parityprobe import TIMEOUT_S, comparable, probe
from tpctl.paritytable import INFO, MISSING, MUST, SHOULD, Row, Sees, compare, findings, judge, spans
from tpctl.runparity import observe
from tpctl.verdict import ORDER, Coverage, Finding, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)
EMPTY = "(empty)"
WIDE_SOURCES = 8  # up to so many, `-o wide` gives each source a column


@options.command(
    app,
    epilog="Examples: tpctl parity-check | tpctl parity-check --set plan.tp=2 | "
    "tpctl parity-check host-a.toml host-b.toml | tpctl parity-check runs/RUN/v0-tp2",
)
def parity_check(
    out: Output,
    given: options.Given,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Snapshots of 'tpctl env --save', or one run directory, of a job that lives or has ended. "
            "None: the launch to come."
        ),
    ] = None,
    strict: options.StrictOption = False,
) -> None:
    """Compare values by rank or host. What must match fails, what should match warns; -o wide shows every key."""
    if not sources:
        gathered = _launch(given.resolve())
    elif len(sources) == 1 and sources[0].is_dir():
        gathered = _run(sources[0])
    else:
        gathered = _snapshots(sources)
    rows = compare(gathered.tables, gathered.sees)
    judged, coverage = judge(rows, len(gathered.tables), gathered.expected)
    verdict = worst([judged, *(finding.verdict for finding in gathered.findings)])
    open_rows = {f"parity.{row.key}" for row in rows if _explained(row, gathered.explained)}
    found = [finding for finding in findings(rows) if finding.id not in open_rows] + gathered.findings
    found.sort(key=lambda finding: -ORDER.index(finding.verdict))
    steps = () if verdict is Verdict.PASS else gathered.steps
    differing = [row for row in rows if row.differs and not _explained(row, gathered.explained)]
    counts = {word: sum(row.severity == word for row in differing) for word in (MUST, SHOULD, INFO)}
    data = {
        "subject": gathered.subject,
        "mode": gathered.mode,
        "sources": list(gathered.tables),
        "states": gathered.states,
        "differing": counts,
        "rows": [row.to_dict() for row in rows],
    }
    for row in rows:
        out.stream("row", row.to_dict())
    wide = out.format is Format.wide
    shown = [_shown(row, wide) for row in (rows if wide else sorted(differing, key=_urgency))]
    columns = [Column(name, name) for name in ("verdict", "severity", "key", "majority", "differs")]
    columns += [Column("coverage", "coverage", narrow=False, right=True)]
    if len(gathered.tables) <= WIDE_SOURCES:
        columns += [Column(name, f"value:{name}", narrow=False) for name in gathered.tables]
    out.emit(
        Envelope("tpctl.parity-check", verdict, data, tuple(found), coverage, steps),
        [Table(columns, shown)] if shown else (),
        [*_summary(verdict, gathered, rows, coverage, counts), *(f"next: {step}" for step in steps)],
    )
    raise typer.Exit(int(for_verdict(verdict, strict)))


@dataclass
class Gathered:
    """Values by source, how many sources there should be, and what is known to be missing."""

    subject: str
    mode: str
    tables: dict[str, dict[str, Any]]
    expected: int
    steps: tuple[str, ...] = ("tpctl config show --origin", "tpctl env")
    sees: dict[str, Sees] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)


def _launch(loaded: Loaded) -> Gathered:
    config = loaded.config
    tables, expected = probe(config), max(2, config.world_size)
    silent = sorted({f"rank{rank}" for rank in range(config.world_size)} - tables.keys())
    if config.world_size == 1:
        # One rank cannot disagree with itself: the check is then between this process and the rank to be.
        tables = {"here": comparable(snapshot.flatten(snapshot.take(loaded))), **tables}
    gathered = Gathered("launch", "launch", tables, expected)
    if silent:
        why = f"{', '.join(silent)} did not answer within {TIMEOUT_S:g} s, or failed"
        gathered.findings.append(Finding("parity.coverage", Verdict.UNKNOWN, why))
    return gathered


def _run(directory: Path) -> Gathered:
    found = observe(directory)
    steps = (f"tpctl triage {directory}", f"tpctl parity-check {directory} -o wide")
    return Gathered(
        f"run {directory.resolve().name}",
        found.mode,
        found.tables,
        found.expected,
        steps,
        found.sees,
        found.states,
        found.findings,
        found.explained,
    )


def _snapshots(paths: list[Path]) -> Gathered:
    """Values by snapshot file, named by its stem where that tells them apart, else by its path.

    Raises:
        SnapshotError: a file that is missing, foreign, damaged, newer than this tool, or given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise SnapshotError(f"the same snapshot was given twice: {', '.join(map(str, paths))}", code="TP-7206")
    unique = len({path.stem for path in paths}) == len(paths)
    taken = {path.stem if unique else str(path): snapshot.read(path) for path in paths}
    gathered = Gathered("snapshots", "snapshots", {}, max(2, len(paths)), ("tpctl env --save FILE on each host",))
    for name, data in taken.items():
        gathered.tables[name] = snapshot.flatten(data)
        gathered.sees[name] = lambda key, data=data: snapshot.sees(data, key)  # type: ignore[misc]
        gathered.states[name] = f"host {data['host']['name']}, schema {data['schema_version']}"
        if not data.get("config"):
            why = f"{name} holds no configuration: it could not be resolved when the snapshot was taken"
            gathered.findings.append(Finding("parity.coverage", Verdict.UNKNOWN, why, where=name))
            gathered.explained.add(name)
    return gathered


def _explained(row: Row, explained: set[str]) -> bool:
    """Whether nothing is known to differ here, and a finding says already why values are missing."""
    missing = {source for source, value in row.values.items() if value == MISSING}
    return bool(missing) and missing <= explained and len({v for v in row.values.values() if v != MISSING}) == 1


def _urgency(row: Row) -> tuple[int, int]:
    return -ORDER.index(row.verdict), (MUST, SHOULD, INFO).index(row.severity)


def _shown(row: Row, wide: bool) -> dict[str, Any]:
    """A row for people: what most hold, and who holds what else. Without a majority: who holds what."""
    holders = {value or EMPTY: sources for value, sources in row.holders().items()}
    most = row.majority if row.majority is None else row.majority or EMPTY
    others = {value: sources for value, sources in holders.items() if value != most}
    return {
        "key": row.key,
        "severity": row.severity,
        "verdict": row.verdict.value,
        "majority": "no majority" if most is None else f"{most} ({len(holders[most])} of {len(row.values)})",
        "differs": "; ".join(f"{spans(sources)}: {value}" for value, sources in others.items()) or None,
        "coverage": f"{row.coverage.checked}/{row.coverage.expected}",
        **({f"value:{name}": value for name, value in row.values.items()} if wide else {}),
    }


def _summary(
    verdict: Verdict, gathered: Gathered, rows: list[Row], coverage: Coverage, counts: dict[str, int]
) -> list[str]:
    mode = "" if gathered.mode == gathered.subject else f" ({gathered.mode})"
    lines = [
        f"{verdict}  {gathered.subject}{mode}: {len(rows)} keys over {len(gathered.tables)} of {gathered.expected} "
        f"sources, {coverage.checked} of {coverage.expected} values known",
        "differ: " + ", ".join(f"{number} {word}" for word, number in counts.items()),
    ]
    by_state: dict[str, list[str]] = {}
    for name, state in gathered.states.items():
        by_state.setdefault(state, []).append(name)
    lines += [f"{spans(names)}: {state}" for state, names in by_state.items()]
    return lines + [f"{f.verdict}  {f.message}" for f in gathered.findings]
