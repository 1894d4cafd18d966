"""`tpctl drill`: break a real job on purpose, and judge how it dies."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import EngineConfig, from_dict
from tpctl import options
from tpctl.commands.bringup import new_run_dir
from tpctl.drill import table
from tpctl.drill.judge import Result, judge, judge_without_guard, observe
from tpctl.drill.ranks import Nursery
from tpctl.drill.table import Drill
from tpctl.errors import MatrixError
from tpctl.exitcodes import for_verdict
from tpctl.matrix.runner import make_assets
from tpctl.output import Column, Envelope, Format, Output, Table, to_json
from tpctl.verdict import Coverage, Verdict, worst

app = typer.Typer(add_completion=False, rich_markup_mode=None)

TIMELINE = """\
[[event]]
at_chunk = 0
prompt = "a red fox in the snow"
[[event]]
at_chunk = 2
prompt = "the same fox at night"
"""
HANG_DEADLINE_S = 8.0
FAR_S = 600.0


@app.command(
    epilog="Examples: tpctl drill --list | tpctl drill OM-11 | tpctl drill OM-21 OM-25 -o json | "
    "tpctl drill OM-12 --without-guard"
)
def drill(
    ids: Annotated[list[str] | None, typer.Argument(help="Drills; OM-21 takes all its variants. None: all.")] = None,
    without_guard: Annotated[
        bool, typer.Option("--without-guard", help="The proof run: the guard is off, and the drill must fail.")
    ] = False,
    list_drills: Annotated[bool, typer.Option("--list", help="List the drills and leave.")] = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Default: runs/<UTC time>-drill.", metavar="DIR")
    ] = None,
    config: options.ConfigOption = None,
    sets: options.SetOption = None,
    output: options.OutputOption = Format.table,
    quiet: options.QuietOption = False,
    no_color: options.NoColorOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Break a real job in one way and check that it dies fast, for the named reason, with nothing left behind."""
    out = Output.open(output, quiet, no_color, debug)
    chosen = table.select(table.load(), ids or ())
    if list_drills:
        print_list(out, chosen)
        return
    base = options.resolve(config, sets).config
    directory = new_run_dir(run_dir or Path("runs") / datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ-drill")).resolve()
    out.say(f"run directory: {directory}")
    make_assets(base, directory)
    results: list[Result] = []
    with Nursery(directory / "nursery.log") as nursery:
        cleans: dict[str, Path] = {}
        for item in chosen:
            clean = None
            if without_guard and item.drift:
                clean = clean_run(nursery, item, base, directory, cleans)
            result = run_one(nursery, item, base, directory / item.id, without_guard, clean)
            results.append(result)
            out.say(f"{result.verdict}  {item.id}  {item.title}")
    envelope = envelope_of(results, directory, without_guard)
    (directory / "result.json").write_text(to_json(envelope.to_dict(), indent=2) + "\n", encoding="utf-8")
    out.emit(envelope, [table_of(results, without_guard)], explain(results, envelope))
    raise typer.Exit(int(for_verdict(envelope.verdict)))


def run_one(
    nursery: Nursery, item: Drill, base: EngineConfig, directory: Path, without_guard: bool, clean: Path | None = None
) -> Result:
    """One drill in `directory`, which is made."""
    hang = without_guard and item.proof == "hang"
    path, config = write_config(item, base, directory, without_guard=without_guard, far=hang)
    budget_s = max(config.liveness.watchdog_s, config.liveness.phase_budget_s)
    deadline_s = HANG_DEADLINE_S if hang else item.deadline_s
    ended = nursery.run(directory, path, item.tp, deadline_s, supervise_s=0.0 if not hang else budget_s)
    seen = observe(item, directory, ended, clean)
    return judge_without_guard(seen) if without_guard else judge(seen)


def clean_run(nursery: Nursery, item: Drill, base: EngineConfig, root: Path, cleans: dict[str, Path]) -> Path:
    """A run of the same configuration with nothing broken, made once for all drills that share it."""
    key = json.dumps([item.tp, dict(item.config)], sort_keys=True)
    if key not in cleans:
        directory = root / f"clean{len(cleans)}"
        path, _ = write_config(item, base, directory, without_guard=False, broken=False)
        ended = nursery.run(directory, path, item.tp, item.deadline_s, supervise_s=0.0)
        if any(ended.codes.values()) or ended.timed_out:
            raise MatrixError(f"the clean run for {item.id} failed: {ended.codes}", code="TP-7311")
        cleans[key] = directory
    return cleans[key]


def write_config(
    item: Drill, base: EngineConfig, directory: Path, *, without_guard: bool, far: bool = False, broken: bool = True
) -> tuple[Path, EngineConfig]:
    """`config.toml` and the timeline of one drill. `far` moves every deadline away, so that a hang shows itself."""
    import tomli_w

    directory.mkdir(parents=True)
    data: dict[str, dict[str, Any]] = base.to_dict()
    data["plan"]["tp"] = item.tp
    data["run"]["timeline"] = str(directory / "timeline.toml")
    data["sink"]["directory"] = str(directory)
    if broken:
        data["drill"] = {
            "id": item.fault,
            "victim_rank": item.victim_rank,
            "at_chunk": item.at_chunk,
            "without_guard": without_guard,
            "differs": item.differs,
        }
    for dotted, value in item.config.items():
        section, key = dotted.split(".", 1)
        data[section][key] = value
    if far:
        data["liveness"] |= {"watchdog_s": FAR_S, "phase_budget_s": FAR_S}
    (directory / "timeline.toml").write_text(TIMELINE, encoding="utf-8")
    config = from_dict(data, item.id)
    path = directory / "config.toml"
    path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
    return path, config


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
        {"id": d.id, "title": d.title, "where": d.where, "code": list(d.code), "fm": d.fm, "proof": d.proof}
        for d in drills
    ]
    columns = [
        Column("drill", "id"),
        Column("breaks", "title"),
        Column("where", "where", narrow=False),
        Column("code", "code"),
        Column("fm", "fm"),
        Column("without guard", "proof"),
    ]
    out.emit(Envelope("tpctl.drill-list", Verdict.PASS, {"drills": rows}), [Table(columns, rows)])
