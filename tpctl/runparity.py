"""What the ranks of a run directory say of themselves, and what the kernel says of those that live."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blackbox import BlackBoxError
from engine.blackbox.reader import Box
from engine.config import load
from engine.errors import EngineError
from tpctl import liverank
from tpctl.errors import SnapshotError
from tpctl.follow import box_ranks, configured_ranks
from tpctl.paritytable import Sees
from tpctl.reports import read_reports
from tpctl.verdict import Finding, Verdict

SHARED = ("collectives_per_call", "replicated_fingerprint")
# The handshake's names for what snapshots call otherwise.
NAMES = {"library.": "versions.", "environment.": "reported.environment.", "code.engine": "code.engine_sha256"}
LIVE = "live"


@dataclass
class RunParity:
    """Values by rank. `states` says of each expected rank whether it lives; `findings` what could not be read."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    sees: dict[str, Sees] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    expected: int = 0

    @property
    def mode(self) -> str:
        living = sum(state.startswith(LIVE) for state in self.states.values())
        return "ended" if not living else "live" if living == len(self.states) else "partly live"

    @property
    def explained(self) -> set[str]:
        """Ranks of which a finding says already that values are missing."""
        return {f.where.replace(" ", "") for f in self.findings if f.where}

    def miss(self, rank: int | None, why: str) -> None:
        """Something is not covered: the answer stays open, whatever the other ranks say."""
        where = None if rank is None else f"rank {rank}"
        self.findings.append(Finding("parity.coverage", Verdict.UNKNOWN, why, where=where))


def observe(directory: Path) -> RunParity:
    """Read all ranks of a run, of which each may live, have ended, or end while it is read.

    Raises:
        SnapshotError: no rank has left anything here.
    """
    reports, boxes = read_reports(directory), box_ranks(directory)
    files = {int(name) for p in directory.glob("ranks/rank*.json") if (name := p.stem.removeprefix("rank")).isdigit()}
    if not reports and not boxes:
        problem = "holds no rank reports (ranks/rank0.json, ...)" if not files else "holds no readable rank report"
        raise SnapshotError(f"{directory} {problem}", code="TP-7207", next_step="tpctl bringup")
    found = RunParity()
    configured = configured_ranks(directory)
    found.expected = max(2, configured, *(rank + 1 for rank in {*reports, *boxes, *files}))
    if not configured:
        found.miss(None, f"{directory} has no readable config.toml: how many ranks there should be is not known")
    for rank in range(found.expected):
        report = reports.get(rank)
        if report is None and rank in files:
            found.miss(rank, f"ranks/rank{rank}.json is damaged, of another version or of another rank")
        _one(found, directory, rank, report)
    if found.mode == "partly live":
        for name, state in found.states.items():
            if name in found.tables and not state.startswith(LIVE):
                found.miss(int(name.removeprefix("rank")), f"{name} {state}: what its process was is not compared")
    _config_file(found, directory)
    return found


def _one(found: RunParity, directory: Path, rank: int, report: Mapping[str, Any] | None) -> None:
    name, seen = f"rank{rank}", None
    process: dict[str, Any] = {}
    try:
        with Box(directory / "ranks" / f"rank{rank}.blackbox") as box:
            seen = (box.pid, box.start_ticks)
    except BlackBoxError as error:
        if (directory / "ranks" / f"rank{rank}.blackbox").exists():
            found.miss(rank, error.message)
    if report is not None and seen is not None and report.get("pid") not in (None, seen[0]):
        found.miss(rank, f"the report of rank {rank} is of process {report['pid']}, its black box of {seen[0]}")
        report = None
    ended = report is not None and report.get("exit_code") is not None
    host = str((report or {}).get("host") or socket.gethostname())
    if ended:
        state = f"ended, exit code {(report or {})['exit_code']}"
    elif report is None and seen is None:
        state = "left nothing"
        found.miss(rank, f"rank {rank} left neither a report nor a black box")
    elif host != socket.gethostname():
        state = f"on {host}"
        found.miss(rank, f"rank {rank} runs on {host}: its process can be read there only")
    elif seen is None:
        state = "ended, without saying how"  # no box, no ending: a report of a run that kept no boxes
    else:
        state, process = _process(found, rank, seen)
    found.states[name] = state
    if report is None and process:
        found.miss(rank, f"rank {rank} has not reported yet: it is still starting")
    table = ({} if report is None else _reported(report)) | process
    if report is not None and not _mapping(report, "parity"):
        found.miss(rank, f"the report of rank {rank} does not say its configuration, versions and code")
    if table:
        found.tables[name] = table
        found.sees[name] = lambda key, read=bool(process): read or not key.startswith(liverank.PREFIXES)  # type: ignore[misc]


def _process(found: RunParity, rank: int, seen: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    try:
        return LIVE, liverank.read(*seen)
    except liverank.GoneError:
        return "ended, without a report of its end", {}
    except OSError as error:
        why = error.strerror or "it cannot be read"
        found.miss(rank, f"process {seen[0]} of rank {rank} cannot be read: {why}")
        return f"{LIVE}, unreadable", {}
    except (ValueError, KeyError) as error:
        found.miss(rank, f"process {seen[0]} of rank {rank} is told by /proc in a way this tool does not know: {error}")
        return f"{LIVE}, unreadable", {}


def _reported(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the rank wrote down as compared at start-up, and as effective."""
    table: dict[str, Any] = {}
    for key, value in _mapping(report, "parity").items():
        prefix = next((old for old in NAMES if key.startswith(old)), None)
        table["python.minor" if key == "python" else NAMES[prefix] + key[len(prefix) :] if prefix else key] = value
    table |= {f"effective.{key}": value for key, value in _mapping(report, "effective").items()}
    generator = _mapping(report, "generator")
    table |= {f"generator.{key}": generator[key] for key in SHARED if key in generator}
    return table | {"plan.tp_plan": report.get("tp_plan"), "info.state": report.get("state")}


def _mapping(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = report.get(name)
    return value if isinstance(value, Mapping) else {}


def _config_file(found: RunParity, directory: Path) -> None:
    """Whether `config.toml` still says what the ranks loaded. It does not matter to them; it misleads readers."""
    try:
        config = load([("run", directory / "config.toml")]).config.to_dict()
    except EngineError:
        return
    now = {f"config.{s}.{key}": json.dumps(value) for s, values in config.items() for key, value in values.items()}
    loaded: dict[str, set[str]] = {}
    for table in found.tables.values():
        for key in now.keys() & table.keys():
            loaded.setdefault(key, set()).add(table[key])
    changed = sorted(key for key, values in loaded.items() if values != {now[key]} and len(values) == 1)
    if changed:
        found.findings.append(
            Finding(
                "parity.config-file",
                Verdict.WARN,
                f"{directory / 'config.toml'} is not what the ranks loaded: {', '.join(changed)}",
                value={key: next(iter(loaded[key])) for key in changed},
                limit={key: now[key] for key in changed},
            )
        )
