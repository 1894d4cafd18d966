"""The files that a rank, its launcher and the referee leave behind, each read with suspicion.

Every reader answers with what it found and with what is wrong, never with an exception: a file may be missing, cut
short, foreign, of a newer version, or no file at all. What comes back has the types that its reader promises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import records
from engine.blackbox import BlackBoxError, Box, Contents, read_box
from engine.lifecycle import RankState
from engine.referee.judge import Kind
from engine.referee.record import SCHEMA as REFEREE_SCHEMA
from engine.referee.record import SCHEMA_VERSION as REFEREE_VERSION
from engine.report import SCHEMA as REPORT_SCHEMA
from engine.report import SCHEMA_VERSION as REPORT_VERSION

MAX_BYTES = 512 << 20
HEAD_BYTES = 1 << 16
TAIL_LINES, TAIL_BYTES = 10, 16384


@dataclass(frozen=True)
class Report:
    """A rank's report, as far as triage needs it. `error` is clean: see `clean_error`."""

    rank: int
    pid: int | None
    host: str | None
    state: str | None
    exit_code: int | None
    error: Mapping[str, Any] | None
    chunks: int
    in_mesh: bool = True


@dataclass(frozen=True)
class BoxSeen:
    """A black box: its contents, the collectives once more as they were packed, and when its process started."""

    contents: Contents
    packed: tuple[bytes, ...] = ()
    start_ticks: int = 0


@dataclass(frozen=True)
class RefereeSaid:
    """The verdict of `RUN/referee.json`. `killed` are the ranks that the referee ended itself."""

    kind: str
    fm: str | None
    triggers: tuple[int, ...]
    victims: tuple[int, ...]
    message: str
    pids: Mapping[int, int]
    signals: Mapping[int, int]
    killed: tuple[int, ...] = ()


def read_json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """An object of a plain file. Both None if there is no such file."""
    try:
        if not path.exists():
            return None, None
        if not path.is_file():
            return None, f"{path.name} is not a plain file"  # reading a pipe or a device might never end
        if path.stat().st_size > MAX_BYTES:
            return None, f"{path.name} is larger than {MAX_BYTES >> 20} MiB"
        data = json.loads(path.read_bytes())
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return None, f"{path.name} is damaged: no JSON"
    return (data, None) if isinstance(data, dict) else (None, f"{path.name} is damaged: no object")


def read_report(path: Path, rank: int) -> tuple[Report | None, str | None]:
    data, problem = read_json(path)
    if data is None:
        return None, problem
    problem = _foreign(path, data, REPORT_SCHEMA, REPORT_VERSION)
    if problem is None and data.get("rank") != rank:
        problem = f"{path.name} says it is of rank {data.get('rank')!r}"
    code, error, chunks = data.get("exit_code"), data.get("error"), data.get("chunks")
    if problem is None and not (code is None or type(code) is int):
        problem = f"{path.name} is damaged: exit_code is {code!r}"
    if problem is None and not (error is None or isinstance(error, dict)):
        problem = f"{path.name} is damaged: error is no object"
    if problem is not None:
        return None, problem
    cleaned = clean_error(error) if error else None
    # One that ended by an error which it does not count as its end.
    code = code or (cleaned.get("exit_code") if cleaned else None) or code
    known = {state.value for state in RankState}
    state, pid, host = data.get("state"), data.get("pid"), data.get("host")
    return Report(
        rank,
        pid if type(pid) is int else None,
        host if isinstance(host, str) else None,
        state if state in known else None,
        code,
        cleaned,
        len(chunks) if isinstance(chunks, list) else 0,
        data.get("mesh_rank") != -1,
    ), None


def clean_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """An error record whose fields have the types they should have; whatever has not is left out."""
    clean: dict[str, Any] = {
        "code": str(error.get("code")),
        "message": printable(str(error.get("message"))),
        "fm": error.get("fm") if isinstance(error.get("fm"), str) else None,
        "exit_code": error.get("exit_code") if type(error.get("exit_code")) is int else None,
        "next": printable(error["next"]) if isinstance(error.get("next"), str) else None,
        "ids": _numbers(error.get("ids")),
    }
    evidence: dict[str, Any] = {}
    told = error.get("evidence")
    told = told if isinstance(told, dict) else {}
    minority = told.get("minority")
    if isinstance(minority, list) and all(type(rank) is int for rank in minority):
        evidence["minority"] = minority
    if _by_rank(told.get("by_rank")):
        evidence["by_rank"] = told["by_rank"]
    differences = told.get("differences")
    if isinstance(differences, dict) and differences and all(_by_rank(row) for row in differences.values()):
        evidence["differences"] = differences
    return clean | {"evidence": evidence}


def _by_rank(table: object) -> bool:
    return isinstance(table, dict) and bool(table) and all(str(rank).isdecimal() for rank in table)


def _numbers(ids: object) -> dict[str, int]:
    return {str(k): v for k, v in ids.items() if type(v) is int} if isinstance(ids, dict) else {}


def read_referee(path: Path) -> tuple[RefereeSaid | None, str | None]:
    data, problem = read_json(path)
    if data is None:
        return None, problem
    problem = _foreign(path, data, REFEREE_SCHEMA, REFEREE_VERSION)
    if problem is not None:
        return None, problem
    try:
        verdict = data["verdict"]
        seats = {int(seat["rank"]): seat for seat in data.get("ranks", ())}
        said = RefereeSaid(
            Kind(verdict["kind"]).value,
            verdict["fm"] if isinstance(verdict["fm"], str) else None,
            _ranks(verdict["triggers"]),
            _ranks(verdict["victims"]),
            printable(str(verdict["message"])),
            {rank: int(seat["pid"]) for rank, seat in seats.items()},
            {rank: int(seat["signal"]) for rank, seat in seats.items() if seat.get("signal")},
            _ranks(data.get("killed", ())),
        )
    except (KeyError, TypeError, ValueError):
        return None, f"{path.name} is damaged: its verdict makes no sense"
    return said, None


def _ranks(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list | tuple) or any(type(rank) is not int or rank < 0 for rank in found):
        raise ValueError("no list of ranks")
    return tuple(found)


def _foreign(path: Path, data: Mapping[str, Any], schema: str, version: int) -> str | None:
    if data.get("schema") != schema:
        return f"{path.name} is no {schema} file"
    if data.get("schema_version") != version:
        return f"{path.name} has version {data.get('schema_version')!r} of {schema}; this tool reads {version}"
    return None


def read_blackbox(path: Path, rank: int) -> tuple[BoxSeen | None, str | None]:
    try:
        if not path.exists():
            return None, None
        if not path.is_file():
            return None, f"{path.name} is not a plain file"
        contents = read_box(path)
        with Box(path) as box:
            packed = tuple(box.collectives(0, contents.live.collectives))
            start_ticks = box.start_ticks
    except BlackBoxError as error:
        return None, error.message.replace(str(path), path.name)
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    names = {group.name for group in contents.groups}
    if contents.rank != rank:
        return None, f"{path.name} says it is of rank {contents.rank}"
    if any(entry.group not in names for entry in contents.collectives):
        return None, f"{path.name} names a group that it does not know"
    return BoxSeen(contents, packed, start_ticks), None


def read_records_head(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The header of the chunk records; a torn last line is a problem of its own. Both None if there is no file."""
    try:
        if not path.exists():
            return None, None
        if not path.is_file():
            return None, f"{path.name} is not a plain file"
        with path.open("rb") as stream:
            first = stream.readline(HEAD_BYTES)
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 1))
            whole = stream.read(1) == b"\n"
        head = json.loads(first)
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return None, f"{path.name} is damaged: its header is no JSON"
    if not isinstance(head, dict):
        return None, f"{path.name} is damaged: its header is no object"
    problem = _foreign(path, head, records.SCHEMA, records.SCHEMA_VERSION)
    if problem is not None:
        return None, problem
    if not isinstance(head.get("job"), str) or type(head.get("world_size")) is not int:
        return None, f"{path.name} has a damaged header"
    return head, None if whole else f"the last line of {path.name} is torn"


def launcher_failures(log: Path) -> dict[int, int]:
    """Exit code by rank, as torchrun's summary in its log lists them; the root cause first."""
    text = read_tail(log)
    pairs = [
        (match.start(), int(match[1]), int(match[2]))
        for match in re.finditer(r"rank\s*:\s*(\d{1,6})[^\n]*\n\s*exitcode\s*:\s*(-?\d{1,4})", text)
    ]
    root = text.find("Root Cause")
    pairs.sort(key=lambda pair: (pair[0] < root, pair[0]))
    return {rank: code for _, rank, code in pairs}


def referee_spoke(run_dir: Path) -> bool:
    """Whether a log shows a verdict of the referee: beside the launcher it shares the log, in drills it has its own."""
    kinds = "|".join(kind.value for kind in Kind)
    logs = (run_dir / "launcher.log", run_dir / "referee.log")
    return any(re.search(rf"^referee: ({kinds})[ :]", read_tail(log), re.MULTILINE) for log in logs)


def rank_log(run_dir: Path, rank: int) -> Path | None:
    """The stderr of a rank of this host, of its last attempt: as the launcher keeps it, or as drills do."""
    found = sorted((run_dir / "logs").glob(f"*/attempt_*/{rank}/stderr.log"))
    plain = run_dir / f"stderr{rank}.log"
    return found[-1] if found else plain if plain.is_file() else None


def tail(log: Path | None) -> tuple[str, ...]:
    """The last lines that say something."""
    lines = [printable(line).rstrip() for line in read_tail(log).splitlines() if line.strip()] if log else []
    return tuple(lines[-TAIL_LINES:])


def read_tail(log: Path) -> str:
    """The end of a text file; empty where there is none."""
    try:
        if not log.is_file():
            return ""
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def printable(text: str) -> str:
    """What a file says must not command the terminal that shows it."""
    return "".join(char if char.isprintable() else " " for char in text)
