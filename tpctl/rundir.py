"""Where a command that runs something puts what it leaves."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tpctl.errors import CliError


def new_run_dir(wanted: Path | None, kind: str) -> Path:
    """Made, empty of earlier results: the one that is wanted, or one below `runs` that tells the time and the kind.

    Raises:
        CliError: it was used before.
    """
    directory = wanted or Path("runs") / datetime.now(UTC).strftime(f"%Y%m%dT%H%M%S%fZ-{kind}")
    if (directory / "result.json").exists() or (directory / "config.toml").exists():
        raise CliError(
            f"{directory} holds an earlier run, which would mix with this one",
            code="TP-7005",
            next_step="choose another --run-dir, or leave it out",
        )
    directory.mkdir(parents=True, exist_ok=True)
    return directory
