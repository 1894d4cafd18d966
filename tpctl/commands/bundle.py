"""`tpctl bundle JOB|RUN` and `tpctl bundle diff A B`: support archives, and what two of them differ in."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tpctl import options
from tpctl.bundle import archive, source
from tpctl.bundle.collect import MIB, Collector
from tpctl.bundle.compare import Row, compare, judge
from tpctl.bundle.manifest import Manifest, Status
from tpctl.examination import examine
from tpctl.exitcodes import for_verdict
from tpctl.output import Column, Envelope, Output, Table
from tpctl.verdict import Finding, Verdict

MADE = "create"


class MadeByDefault(TyperGroup):
    """`tpctl bundle JOB` is `tpctl bundle create JOB`; a job that is called like a command is made by the long form."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [MADE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=MadeByDefault,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Pack what a job or a run left into one support archive (tpctl bundle JOB); compare two of them.",
)


@options.command(
    app,
    MADE,
    epilog="Examples: tpctl bundle JOB | tpctl bundle JOB --without-prompts | "
    "tpctl bundle create JOB --out night.tar.gz",
)
def create(
    out: Output,
    target: Annotated[str, typer.Argument(help="A job's name, or a run directory.", metavar="JOB|RUN_DIR")],
    to: Annotated[
        Path | None, typer.Option("--out", help="Default: NAME-bundle-<UTC time>.tar.gz here.", metavar="FILE")
    ] = None,
    without_prompts: Annotated[bool, typer.Option("--without-prompts", help="Prompts stay on this host.")] = False,
    max_mib: Annotated[int, typer.Option("--max-mib", min=1, max=512, help="How much it holds, unpacked.")] = 64,
) -> None:
    """Pack a support archive. It always succeeds with what is there; exit code 5 if something should be and is not."""
    found = source.find(target)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = to or Path(f"{found.name}-bundle-{stamp}.tar.gz")
    collector = Collector(found, lambda run: examine(run).to_dict(), not without_prompts, max_mib * MIB)
    manifest = collector.collect()
    size = archive.write(manifest, path)
    out.say(f"wrote {path}")
    envelope = _envelope(manifest, path, size)
    rows = [item | {"kib": -(-item["size_bytes"] // 1024)} for item in envelope.data["items"]]
    rows = [row for row in rows if row["expected"] or row["status"] != Status.missing]
    columns = [
        Column("item", "name"),
        Column("status", "status"),
        Column("KiB", "kib", right=True),
        Column("why", "why", narrow=False),
    ]
    covered = manifest.coverage
    words = [f"lacks {row['name']}: {row['why']}" for row in rows if row["sha256"] is None]
    words += [
        f"{manifest.verdict}  {covered.checked} of {covered.expected} expected items, {size >> 10} KiB  {path}",
        f"next: {envelope.next[0]}",
    ]
    out.emit(envelope, [Table(columns, rows)], words)
    raise typer.Exit(int(for_verdict(manifest.verdict)))


def _envelope(manifest: Manifest, path: Path, size: int) -> Envelope:
    findings = [
        Finding(f"bundle.{item.status}", Verdict.UNCHECKED, f"{item.name}: {item.why}", where=item.name)
        for item in manifest.items
        if item.expected and not item.covered
    ]
    said = manifest.to_dict()
    data = {key: said[key] for key in ("kind", "target", "host", "made_at", "prompts", "runs", "items")}
    data |= {"path": str(path), "size_bytes": size}
    step = f"tpctl triage {shlex.quote(str(path))}"
    return Envelope(
        "tpctl.bundle", manifest.verdict, data, tuple(findings), manifest.coverage, (step,), manifest.target
    )


@options.command(
    app, epilog="Examples: tpctl bundle diff A.tar.gz B.tar.gz | tpctl bundle diff A.tar.gz B.tar.gz --all -o json"
)
def diff(
    out: Output,
    first: Annotated[Path, typer.Argument(help="A bundle.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    everything: Annotated[bool, typer.Option("--all", "-a", help="What is the same as well.")] = False,
) -> None:
    """Compare two bundles. Exit code 0 where they say the same, 3 where they differ, 5 where one cannot tell."""
    bundles = [archive.read(path) for path in (first, second)]
    rows = compare(*bundles)
    verdict, coverage = judge(rows)
    shown = [row for row in rows if everything or row.differs is not False]
    problems = [
        Finding("bundle.altered", Verdict.UNKNOWN, f"{bundle.path}: {problem}", where=str(bundle.path))
        for bundle in bundles
        for problem in bundle.problems
    ]
    if problems and verdict is Verdict.PASS:
        verdict = Verdict.UNKNOWN
    data: dict[str, Any] = {"a": str(first), "b": str(second), "rows": [row.to_dict() for row in shown]}
    findings = (*problems, *(_finding(row) for row in rows if row.differs is not False))
    steps = tuple(f"tpctl triage {shlex.quote(str(path))}" for path in (first, second))
    differing, untold = sum(row.differs is True for row in rows), sum(row.differs is None for row in rows)
    words = [f"{finding.verdict}  {finding.message}" for finding in problems]
    words.append(f"{verdict}  {differing} of {len(rows)} facts differ, {untold} cannot be compared")
    columns = [Column(word, word) for word in ("topic", "key", "a", "b")]
    tables = [Table(columns, data["rows"])] if shown else []
    out.emit(Envelope("tpctl.bundle-diff", verdict, data, findings, coverage, steps), tables, words)
    raise typer.Exit(int(for_verdict(verdict)))


def _finding(row: Row) -> Finding:
    verdict = Verdict.UNKNOWN if row.differs is None else Verdict.FAIL
    return Finding(f"bundle.{row.topic}", verdict, f"{row.key}: {row.a} and {row.b}", row.a, row.b)
