"""A run's timeline as files: `timeline.json` for Perfetto, `overlap.svg` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.errors import CliError, RunError
from tpctl.trace.events import trace
from tpctl.trace.picture import picture
from tpctl.trace.run import Run, read_run

TIMELINE, OVERLAP = "timeline.json", "overlap.svg"


def write_trace(run: Run, title: str, path: Path) -> Mapping[str, Any]:
    """Returns what was written. Raises CliError: the file cannot be."""
    made = trace(run, title)
    _write(path, json.dumps(made, separators=(",", ":"), allow_nan=False) + "\n")
    return made


def write_picture(run: Run, title: str, path: Path) -> None:
    """Raises RunError: too few chunks. CliError: the file cannot be written."""
    _write(path, picture(run, title))


def _write(path: Path, text: str) -> None:
    """Replaced whole: who reads it while a job runs never sees half."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CliError(
            f"cannot write {path}: {error.strerror}",
            code="TP-7805",
            where=str(path),
            next_step="tpctl timeline RUN --out timeline.json",
        ) from error


@dataclass(frozen=True)
class Drawn:
    """The files that were written, by what they are, and why one was not."""

    outputs: Mapping[str, str]
    problems: tuple[str, ...] = ()


def draw(run_dir: Path, title: str) -> Drawn:
    """Both files into the run's own directory. Never raises for what a run left: that is for the gates to judge."""
    outputs: dict[str, str] = {}
    problems = []
    try:
        run = read_run(run_dir)
        write_trace(run, title, run_dir / TIMELINE)
        outputs["timeline"] = str(run_dir / TIMELINE)
        write_picture(run, title, run_dir / OVERLAP)
        outputs["overlap"] = str(run_dir / OVERLAP)
    except (RunError, CliError) as error:
        problems.append(f"{error.code}: {error.message}")
    return Drawn(outputs, tuple(problems))
