"""Why an attempt failed, in one sentence: the referee's verdict, else the first rank that reported an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpctl.errors import JobError
from tpctl.jobs.record import read_json
from tpctl.launch.referee import VERDICT
from tpctl.remains import launcher_failures
from tpctl.reports import read_reports


def exit_codes(run_dir: Path) -> dict[int, int]:
    """Exit code by rank: as it reported itself, else as the launcher saw it end."""
    found = launcher_failures(run_dir / "launcher.log")
    reports = read_reports(run_dir)
    found |= {rank: report["exit_code"] for rank, report in reports.items() if report.get("exit_code") is not None}
    return dict(sorted(found.items()))


def first_reason(run_dir: Path) -> str | None:
    """None if nothing that was left says why."""
    try:
        verdict = read_json(run_dir / VERDICT)["verdict"]
        return f"{verdict['fm'] or verdict['kind']}: {verdict['message']}"
    except (JobError, KeyError, TypeError):
        pass
    failed: list[tuple[float, str]] = []
    for rank, report in read_reports(run_dir).items():
        error: dict[str, Any] | None = report.get("error")
        if error:
            when = max((report.get("times") or {}).values(), default=0.0)
            failed.append((when, f"rank {rank}: {error['code']}: {error['message']}"))
    if failed:
        return min(failed)[1]
    codes = {rank: code for rank, code in launcher_failures(run_dir / "launcher.log").items() if code}
    return ", ".join(f"rank {rank} ended with {code}" for rank, code in codes.items()) or None
