"""`tpctl parity-check`: what differs between the ranks of a launch, of a run, or between hosts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import EngineConfig
from tpctl import options, snapshot
from tpctl.errors import SnapshotError
from tpctl.exitcodes import for_verdict
from tpctl.launch.environment import rank_environment
from tpctl.output import Column, Envelope, Format, Output, Table
from tpctl.paritytable import INFO, compare, findings, judge
from tpctl.verdict import Verdict

app = typer.Typer(add_completion=False, rich_markup_mode=None)
PROBE_TIMEOUT_S = 30.0


@app.command(
    epilog="Examples: tpctl parity-check | tpctl parity-check --set plan.tp=2 | "
    "tpctl parity-check host-a.toml host-b.toml | tpctl parity-check runs/RUN/v0-tp2"
)
def parity_check(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="Snapshots of 'tpctl env --save', or one run directory. None: the launch to come."),
    ] = None,
    config: options.ConfigOption = None,
    sets: options.SetOption = None,
    strict: options.StrictOption = False,
    output: options.OutputOption = Format.table,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Compare values by rank or host. MUST differences fail, SHOULD differences warn; -o wide shows every key."""
    out = Output.open(output, quiet, no_color, debug)
    if sources:
        tables, expected, subject = gather(sources)
    else:
        resolved = options.resolve(config, sets).config
        tables, expected, subject = probe(resolved), max(2, resolved.world_size), "launch"
        if resolved.world_size == 1:
            # One rank cannot disagree with itself: the check is then between this process and the rank to be.
            tables = {"here": snapshot.flatten(snapshot.take(options.resolve(config, sets))), **tables}
            tables = {name: _comparable(table) for name, table in tables.items()}
    rows = compare(tables)
    verdict, coverage = judge(rows, len(tables), expected)
    found = findings(rows)
    steps = () if verdict is Verdict.PASS else ("tpctl config show --origin", "tpctl env")
    data = {"subject": subject, "sources": list(tables), "rows": [row.to_dict() for row in rows]}
    for row in rows:
        out.stream("row", row.to_dict())
    columns = [Column("key", "key"), Column("severity", "severity"), Column("verdict", "verdict")]
    columns += [Column(name, f"value:{name}") for name in tables] + [Column("differs", "differs")]
    shown = [
        {
            **row.to_dict(),
            "differs": ", ".join(row.minority) or ("-" if len(set(row.values.values())) == 1 else "no majority"),
            **{f"value:{name}": value for name, value in row.values.items()},
        }
        for row in rows
        if output is Format.wide or len(set(row.values.values())) > 1
    ]
    differing = [row for row in rows if len(set(row.values.values())) > 1]
    summary = (
        f"{verdict}  {subject}: {len(rows)} keys over {len(tables)} sources ({coverage.checked} of {coverage.expected} "
        f"values compared), {len(differing)} differ, {sum(row.severity == INFO for row in differing)} of them for info"
    )
    out.emit(
        Envelope("tpctl.parity-check", verdict, data, found, coverage, steps),
        [Table(columns, shown)] if shown else (),
        [summary, *(f"next: {step}" for step in steps)],
    )
    raise typer.Exit(int(for_verdict(verdict, strict)))


def gather(paths: list[Path]) -> tuple[dict[str, dict[str, Any]], int, str]:
    """Values by source from snapshot files, or from the rank reports of one run directory."""
    if len(paths) == 1 and paths[0].is_dir():
        return from_run(paths[0])
    tables: dict[str, dict[str, Any]] = {}
    for path in paths:
        data = snapshot.read(path)
        name = str(data.get("host", {}).get("name", path.stem))
        tables[path.stem if name in tables or len({p.stem for p in paths}) == len(paths) else str(path)] = (
            snapshot.flatten(data)
        )
    if len(tables) < len(paths):
        raise SnapshotError(f"the same snapshot was given twice: {', '.join(map(str, paths))}", code="TP-7206")
    return tables, len(paths), "snapshots"


def from_run(directory: Path) -> tuple[dict[str, dict[str, Any]], int, str]:
    """What the ranks of a run reported as effective. Every rank of the plan is expected to have reported."""
    from engine.config import load
    from tpctl.matrix.observation import read_reports

    reports = read_reports(directory)
    if not reports:
        raise SnapshotError(
            f"{directory} holds no rank reports (ranks/rank0.json, ...)", code="TP-7207", next_step="tpctl bringup"
        )
    config = directory / "config.toml"
    expected = load([("run", config)]).config.world_size if config.is_file() else len(reports)
    shared = ("collectives_per_call", "replicated_fingerprint")
    tables = {
        f"rank{rank}": {f"effective.{key}": value for key, value in report.get("effective", {}).items()}
        | {f"generator.{key}": report["generator"][key] for key in shared if key in report.get("generator", {})}
        | {"plan.tp_plan": report.get("tp_plan"), "info.state": report.get("state")}
        for rank, report in sorted(reports.items())
    }
    return tables, max(2, expected), f"run {directory.name}"


def probe(config: EngineConfig) -> dict[str, dict[str, Any]]:
    """Start one short process for each rank, in the environment its rank would have; what each sees, by rank.

    A probe that fails or does not answer in time is left out: the caller's coverage then says so.
    """
    import tomli_w

    with tempfile.TemporaryDirectory(prefix="tpctl-parity-") as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "tpctl.snapshot", str(path)]
        running = {
            f"rank{rank}": subprocess.Popen(
                command, env=rank_environment() | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(config.world_size)
        }
        tables = {}
        try:
            for name, process in running.items():
                text, _ = process.communicate(timeout=PROBE_TIMEOUT_S)
                if process.returncode == 0:
                    tables[name] = _comparable(snapshot.flatten(json.loads(text)))
        except subprocess.TimeoutExpired:
            pass  # this rank and those behind it stay uncovered
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.kill()
                process.communicate()
    return tables


def _comparable(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the launcher sets for ranks on purpose, and without variables that became configuration."""
    return {key: value for key, value in table.items() if not key.startswith(("environment.", "threads."))}
