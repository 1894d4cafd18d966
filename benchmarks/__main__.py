"""`python -m benchmarks [NAME...]`: run the benchmarks, print a table, write benchmarks/results.json.

A missed target is said, not hidden, and is no failure of the run: the exit code is 0 unless a benchmark breaks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

NAMES = (
    "help_time",
    "envelope",
    "generator",
    "tensor_parallel",
    "compiled",
    "worker_memory",
    "blackbox",
    "tripwires",
    "rivals",
    "parity_scale",
    "control_load",
    "overlap",
    "link",
)
RESULTS = Path(__file__).with_name("results.json")
VERDICTS = {True: "met", False: "MISSED", None: ""}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios against named rivals.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer samples: a look, not a result")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the JSON")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; known: {', '.join(NAMES)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: dict[str, list[Row]] = {}
    failures: dict[str, str] = {}
    for name in options.names or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows[name] = importlib.import_module(f"benchmarks.{name}").run(options.quick)
        except Exception as error:  # noqa: BLE001 - one broken benchmark must not hide the others
            failures[name] = str(error) or type(error).__name__
    show(rows, failures)
    options.output.write_text(json.dumps(results(rows, failures, options.quick), indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 1 if failures else 0


def results(rows: dict[str, list[Row]], failures: dict[str, str], quick: bool) -> dict[str, Any]:
    """Everything as plain data, with what it was measured on."""
    return {
        "schema": "tpctl.benchmarks",
        "schema_version": 1,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load_average": list(os.getloadavg()),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "rows": [{"benchmark": name, **row.to_dict()} for name, found in rows.items() for row in found],
        "failures": failures,
    }


def _cpu() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(rows: dict[str, list[Row]], failures: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Ratios, measured in turns in one run")
    for heading in ("what", "ours", "against", "its value", "ratio", "spread", "target", ""):
        table.add_column(heading, justify="right" if heading in {"ours", "its value", "ratio"} else "left")
    notes: list[str] = []
    for row in (row for found in rows.values() for row in found):
        mark = ""
        if row.note:
            notes.append(f"[{len(notes) + 1}] {row.name}: {row.note}")
            mark = f" \\[{len(notes)}]"
        spread = f"{row.low:.2f}..{row.high:.2f}" if row.low is not None and row.samples > 1 else ""
        target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
        verdict = VERDICTS[row.met]
        table.add_row(
            row.name + mark,
            f"{row.ours:.2f} {row.unit}",
            row.rival_name,
            f"{row.rival:.2f} {row.unit}",
            f"{row.ratio:.3f}",
            spread,
            target,
            f"[red]{verdict}[/red]" if verdict == "MISSED" else verdict,
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    missed = [row.name for found in rows.values() for row in found if row.met is False]
    if missed:
        console.print(f"missed: {', '.join(missed)}", markup=False)
    for name, failure in failures.items():
        console.print(f"broken: {name}: {failure}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
