"""The log files of a run. Each is read as it grows: `poll` gives the entries that came since the last time.

What a file says is data: a line that makes no sense is counted and named, never raised, and no text from a file can
command the terminal that shows it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.log import IDS, SCHEMA, SCHEMA_VERSION, Level, log_path, older
from tpctl.launch.referee import VERDICT
from tpctl.logs.entry import Entry, Origin
from tpctl.remains import printable, read_json, read_referee

HEAD_BYTES = 256
MAX_FILES = 100  # of one rank: more than any `log.keep` that makes sense
SUPERVISOR = re.compile(r"(\d{4}-\d\d-\d\dT\S+) supervisor: (.*)")
# A line of the launcher's own logger: its letter, month, day and time of day, the process, the place.
GLOG = re.compile(r"([IWEF])(\d\d)(\d\d) (\d\d:\d\d:\d\d\.\d{3,6}) +\d+ [^\]]*\] ?(.*)")
LETTERS = {"I": Level.info, "W": Level.warning, "E": Level.error, "F": Level.error}


class Source(ABC):
    """One writer's file or files. `problems` is what could not be read of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[str] = []

    @abstractmethod
    def poll(self) -> list[Entry]:
        """What came since the last time, in the writer's order."""

    def refuse(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


class Growing:
    """A text file from where it was left; a last line without its end waits for it. Open only while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = b""  # tells the file from another that took its place, even under the same inode
        self._offset = 0
        self._rest = b""

    def lines(self) -> list[str] | None:
        """None: another file stands in its place, and the next call begins with that one."""
        if not self.path.is_file():  # reading a pipe might never end
            return []
        with self.path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
            if not head.startswith(self._head):
                self._head, self._offset, self._rest = b"", 0, b""
                return None
            self._head = head
            stream.seek(self._offset)
            raw = stream.read()
        self._offset += len(raw)
        *lines, self._rest = (self._rest + raw).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]


class RankLog(Source):
    """`ranks/rank{r}.log.jsonl`, over its rotations: `seq` tells what was read already, and what was rotated away."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        super().__init__(f"rank {rank}")
        self.rank = rank
        self._path = log_path(run_dir, rank)
        self._file = Growing(self._path)
        self._host: str | None = None
        self._seq = 0
        self._began = False

    def poll(self) -> list[Entry]:
        try:
            lines = self._file.lines() if self._began else None
            self._began = True
            return self._all() if lines is None else self._taken(lines)
        except OSError as error:
            self.refuse(f"{self._path.name} cannot be read: {error.strerror}")
            return []

    def _all(self) -> list[Entry]:
        """Every file there is, the oldest first; `seq` tells what was read before. Another rotation meanwhile is seen
        at the next poll."""
        entries: list[Entry] = []
        for number in range(MAX_FILES, 0, -1):
            entries += self._taken(Growing(older(self._path, number)).lines() or [])
        return entries + self._taken(self._file.lines() or [])

    def _taken(self, lines: list[str]) -> list[Entry]:
        entries = []
        for line in lines:
            try:
                data = json.loads(line)
            except (ValueError, RecursionError):
                data = None
            if not isinstance(data, dict):
                self.refuse(f"{self._path.name} has damaged lines: no JSON object")
            elif "schema" in data:
                self._head(data)
            elif (entry := self._entry(data)) is None:
                self.refuse(f"{self._path.name} has damaged lines: no event of a rank's log")
            elif entry.seq is not None and entry.seq > self._seq:
                if self._seq and entry.seq > self._seq + 1:
                    self.refuse(f"{self._path.name}: events {self._seq + 1} to {entry.seq - 1} are gone")
                self._seq = entry.seq
                entries.append(entry)
        return entries

    def _head(self, data: dict[str, Any]) -> None:
        if data.get("schema") != SCHEMA or data.get("schema_version") != SCHEMA_VERSION:
            self.refuse(f"{self._path.name} is not a log that this tool reads: {data.get('schema')!r}")
        if data.get("rank") != self.rank:
            self.refuse(f"{self._path.name} says it is of rank {data.get('rank')!r}")
        self._host = data["host"] if isinstance(data.get("host"), str) else None

    def _entry(self, data: dict[str, Any]) -> Entry | None:
        try:
            unix_s = datetime.fromisoformat(data["ts"]).timestamp()
            level = Level(data["level"])
        except (KeyError, TypeError, ValueError):
            return None
        ids = {name: data.get(name) for name in IDS}
        whole = all(value is None or type(value) is int for value in ids.values())
        if not whole or type(data.get("seq")) is not int or type(data.get("mono_ns")) is not int:
            return None
        more = data.get("data")
        return Entry(
            source=self.name,
            origin=Origin.rank,
            level=level,
            message=printable(str(data.get("message"))),
            rank=self.rank,
            role=printable(str(data.get("role"))),
            event=printable(str(data.get("event"))),
            seq=data["seq"],
            unix_s=unix_s,
            mono_ns=data["mono_ns"],
            host=self._host,
            ids=ids,
            data=more if isinstance(more, dict) else {},
        )


class SupervisorLog(Source):
    """`supervisor.log` of a job: of this attempt alone, where times of others are known."""

    def __init__(self, path: Path, since_s: float, until_s: float | None) -> None:
        super().__init__("supervisor")
        self._file = Growing(path)
        self._since_s = since_s
        self._until_s = until_s
        self._unix_s: float | None = None

    def poll(self) -> list[Entry]:
        entries = []
        for line in self._file.lines() or ():
            found = SUPERVISOR.fullmatch(line)
            if found is not None:
                try:
                    self._unix_s = datetime.fromisoformat(found[1]).timestamp()
                except ValueError:
                    found = None
            now_s = self._unix_s
            if not line.strip() or now_s is None or now_s < self._since_s or now_s >= (self._until_s or now_s + 1):
                continue
            text = found[2] if found is not None else line
            level = Level.warning if re.search(r"\bfail|abort|no restart", text) else Level.info
            entries.append(Entry(self.name, Origin.supervisor, level, printable(text), unix_s=now_s))
        return entries


class TextLog(Source):
    """What the launcher, or a rank beside its log, printed. Lines of the launcher's logger tell their time and level;
    those that follow one belong to it."""

    def __init__(self, path: Path, origin: Origin, rank: int | None = None) -> None:
        super().__init__(f"rank {rank} stderr" if rank is not None else origin.value)
        self._file = Growing(path)
        self._origin = origin
        self._rank = rank
        self._level = Level.info
        self._unix_s: float | None = None

    def poll(self) -> list[Entry]:
        return [self._entry(line) for line in self._file.lines() or () if line.strip() and not _referee(line)]

    def _entry(self, line: str) -> Entry:
        found, text = GLOG.match(line), line
        if found is not None:
            self._level, text = LETTERS[found[1]], found[5]
            self._unix_s = self._moment(found) or self._unix_s
        return Entry(
            self.name,
            self._origin,
            self._level,
            printable(text.rstrip()),
            rank=self._rank,
            unix_s=self._unix_s,
            continues=found is None,
        )

    def _moment(self, found: re.Match[str]) -> float | None:
        """Local time without a year: that of the file."""
        try:
            year = datetime.fromtimestamp(self._file.path.stat().st_mtime).year  # noqa: DTZ006
            return datetime.fromisoformat(f"{year}-{found[2]}-{found[3]}T{found[4]}").timestamp()
        except (OSError, ValueError):
            return None


def _referee(line: str) -> bool:
    """The verdict stands in the launcher's log too; it is told once, from the referee's own record."""
    return line.startswith("referee: ")


class RefereeLog(Source):
    """The verdict in `referee.json`, once it is there."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__("referee")
        self._path = run_dir / VERDICT
        self._told = False

    def poll(self) -> list[Entry]:
        if self._told:
            return []
        said, problem = read_referee(self._path)
        if problem is not None:
            self.refuse(problem)
        if said is None:
            return []
        self._told = True
        times = (read_json(self._path)[0] or {}).get("times") or {}
        when = times.get("decided_unix") if isinstance(times, dict) else None
        unix_s = float(when) if isinstance(when, int | float) else None
        words = f"{f'[{said.fm}] ' if said.fm else ''}{said.message}"
        data = {"fm": said.fm, "triggers": list(said.triggers), "victims": list(said.victims)}
        return [
            Entry(self.name, Origin.referee, Level.error, words, event=said.kind, unix_s=unix_s, data=data),
        ]
