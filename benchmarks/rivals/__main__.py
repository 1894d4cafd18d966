"""`python -m benchmarks.rivals [RESULTS.json]`: the rivals' table of a results file, as Markdown."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS
from benchmarks.rivals import DRILL, RIVALS
from benchmarks.rivals.arms import DETAIL, GUARDED, PLAIN, TORCHRUN

HEADINGS = {
    PLAIN: "plain processes",
    TORCHRUN: "torchrun",
    DETAIL: "torchrun, `DETAIL`",
    GUARDED: "same loop, `Group` + referee",
    DRILL: "the engine's drill",
}


def main(arguments: list[str]) -> int:
    data = json.loads((Path(arguments[0]) if arguments else RESULTS).read_text(encoding="utf-8"))
    print(markdown([row for row in data["rows"] if row["benchmark"] == "rivals"]))
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row a fault, a column an arm: milliseconds to the first and to the last rank's end, and the blame."""
    faults: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in (row for row in rows if row.get("fault")):
        cells = faults.setdefault(row["name"], {})
        cells[row["arm"]] = row["runs"]
        cells[row["own"]] = row["own_runs"]
    columns = [*RIVALS, GUARDED, DRILL]
    lines = ["| fault | " + " | ".join(HEADINGS[arm] for arm in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, cells in faults.items():
        lines.append(f"| {name} | " + " | ".join(cell(cells.get(arm)) for arm in columns) + " |")
    lines.append("| blame right / wrong / none | " + " | ".join(count(faults, arm) for arm in columns) + " |")
    return "\n".join(lines)


def cell(runs: list[dict[str, Any]] | None) -> str:
    if not runs:
        return "-"
    if any(run["ending"] == "cut" for run in runs):
        return "hangs"
    if all(run["ending"] == "silent" for run in runs):
        return "**never noticed**"
    first, last = (statistics.median(run[key] for run in runs if run[key] is not None) for key in TIMES)
    right = sum(run["right"] is True for run in runs)
    wrong = sum(run["right"] is False for run in runs)
    blame = f"right {right} of {len(runs)}" if right or wrong else "names nobody"
    return f"{first:.0f} / {last:.0f} ms, {blame}"


TIMES = ("first_ms", "ranks_gone_ms")


def count(faults: dict[str, dict[str, list[dict[str, Any]]]], arm: str) -> str:
    """Over all endings; a job that hangs or ends well blames nobody."""
    runs = [run for cells in faults.values() for run in cells.get(arm) or ()]
    return " / ".join(str(sum(run["right"] is value for run in runs)) for value in (True, False, None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
