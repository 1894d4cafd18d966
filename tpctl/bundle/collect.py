"""Collecting a bundle. Nothing here fails: what is not there, or cannot be read, is an item that says so."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.blackbox import BlackBoxError, read_box
from engine.config import load
from engine.errors import ConfigError, EngineError
from engine.referee.snapshot import Life
from tpctl import liverank, snapshot
from tpctl.bundle.manifest import Item, Manifest, Status
from tpctl.bundle.reading import Read, read_bounded
from tpctl.bundle.redact import Redactor, UnclearError, prompts_of
from tpctl.bundle.source import Source
from tpctl.errors import JobError
from tpctl.evidence import LAUNCHER_LOG, RankSeen, Seen, gather
from tpctl.jobs import ending
from tpctl.jobs.observe import observe
from tpctl.jobs.order import read_order
from tpctl.jobs.record import JobRecord
from tpctl.jobs.view import look, rank_rows, row
from tpctl.launch.referee import VERDICT
from tpctl.output import plain

MIB = 1 << 20
LOG_BYTES = MIB
RECORD_BYTES = 8 * MIB
REPORT_BYTES = 32 * MIB
SMALL_BYTES = 4 * MIB
KEPT_CHUNKS = 1000
# A box that is being written may be copied in the middle of a record.
COPIES = 5
MAX_LOGS = 256
MAX_RUNS = 128


class Collector:
    """One bundle in the making.

    Args:
        triage: judges a run directory; a record that JSON can hold.
        prompts: whether prompts may leave the host.
    """

    def __init__(self, source: Source, triage: Callable[[Path], dict[str, Any]], prompts: bool, max_bytes: int) -> None:
        self.source = source
        self._triage = triage
        self._max_bytes = max_bytes
        self._items: list[Item] = []
        self._runs: list[dict[str, Any]] = []
        self._seen = {label: gather(run) for label, run in source.runs[:MAX_RUNS]}
        self._redactor = Redactor(self._environments(), None if prompts else self._prompts())

    def collect(self) -> Manifest:
        """Everything, the most telling first: where the bundle is full, what comes later has no room."""
        self._host()
        self._triages()
        if self.source.job is not None:
            self._job()
        for label, run in self.source.runs[:MAX_RUNS]:
            self._run(label, run, self._seen[label])
        for label, run in self.source.runs[:MAX_RUNS]:
            self._logs(label, run, self._seen[label])
        if not self.source.runs:
            self._lacks("runs", "it never started: there is no attempt")
        elif len(self.source.runs) > MAX_RUNS:
            self._lacks("runs/others", f"a bundle holds {MAX_RUNS} runs, and there are {len(self.source.runs)}")
        return Manifest(
            kind="job" if self.source.job is not None else "run",
            target=self.source.name,
            host=socket.gethostname(),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            prompts=not self._redactor.prompts,
            runs=tuple(self._runs),
            items=tuple(self._within_bounds()),
        )

    # Parts ---------------------------------------------------------------------------------------------------------

    def _host(self) -> None:
        loaded: Any = None
        if self.source.config is not None:
            try:
                loaded = load([("job", self.source.config)])
            except ConfigError as error:
                loaded = error
            except EngineError:
                loaded = None
        self._made("host.toml", lambda: snapshot.take(loaded), snapshot.sealed)

    def _triages(self) -> None:
        runs = self.source.runs[:MAX_RUNS]
        if runs:
            self._made("triage.json", lambda: {"runs": [{"label": label} | self._triage(run) for label, run in runs]})

    def _job(self) -> None:
        job = self.source.job
        assert job is not None
        for path, expected in (
            (job.record, True),
            (job.config, True),
            (job.timeline, False),
            (job.order, False),
            (job.answer, False),
        ):
            self._file(f"job/{path.name}", path, SMALL_BYTES, expected)
        self._file("job/supervisor.log", job.log, LOG_BYTES, expected=False)

        def state() -> dict[str, Any]:
            found = look(job)
            health = found.health
            return row(found) | {
                "ranks": rank_rows(found.seen),
                "findings": [finding.to_dict() for finding in health.findings],
                "coverage": {"checked": health.coverage.checked, "expected": health.coverage.expected},
            }

        self._made("job/status.json", state)
        self._made(
            "job/receipt.json",
            lambda: ending.receipt(job, read_order(job.order), observe(job)).to_dict(),
        )

    def _run(self, label: str, run: Path, seen: Seen) -> None:
        base = f"runs/{label}"
        lives = {str(rank.rank): rank.life.value for rank in seen.ranks if rank.life is not None}
        # One for all ranks, or, where somebody gave each its own, one a rank.
        for path in sorted(run.glob("config*.toml")) or [run / "config.toml"]:
            self._file(f"{base}/{path.name}", path, SMALL_BYTES)
        self._file(f"{base}/{VERDICT}", run / VERDICT, SMALL_BYTES, expected=False)
        for name in ("result.json", "drill.json"):
            if (run / name).exists():
                self._file(f"{base}/{name}", run / name, SMALL_BYTES, expected=False)
        here = self._ranks_here()
        for rank in seen.ranks:
            expected = here is None or rank.rank in here
            self._report(base, run, rank.rank, expected)
            self._box(label, run, rank.rank, expected)
            records = f"ranks/rank{rank.rank}.chunks.jsonl"
            known = rank.report is not None and rank.report.in_mesh
            self._file(f"{base}/{records}", run / records, RECORD_BYTES, expected and known, keep_head=True)
            if rank.alive and not self._proc(label, rank):
                lives[str(rank.rank)] = Life.GONE.value
        self._runs.append({"label": label, "lives": lives})

    def _logs(self, label: str, run: Path, seen: Seen) -> None:
        base = f"runs/{label}"
        self._file(f"{base}/{LAUNCHER_LOG}", run / LAUNCHER_LOG, LOG_BYTES, expected=self.source.job is not None)
        logs = {*run.glob("logs/**/*"), *run.glob("*.log"), *run.glob("host*/*.log"), *run.glob(f"host*/{VERDICT}")}
        found = sorted(path for path in logs - {run / LAUNCHER_LOG} if not path.is_dir())
        for path in found[:MAX_LOGS]:
            self._file(f"{base}/{path.relative_to(run)}", path, LOG_BYTES)
        if len(found) > MAX_LOGS:
            self._lacks(f"{base}/logs", f"a bundle holds {MAX_LOGS} logs of a run, and there are {len(found)}")
        if not found and seen.ranks:
            self._lacks(f"{base}/logs", "no log of any rank")

    def _ranks_here(self) -> frozenset[int] | None:
        """The ranks that this host runs; None where all are expected."""
        if self.source.job is None:
            return None
        try:
            return frozenset(JobRecord.read(self.source.job.record).ranks_here)
        except JobError:
            return None

    # Kinds of items ------------------------------------------------------------------------------------------------

    def _file(self, name: str, path: Path, limit_bytes: int, expected: bool = True, keep_head: bool = False) -> None:
        """A file of text."""
        self._keep(name, read_bounded(path, limit_bytes, keep_head), expected)

    def _keep(self, name: str, read: Read, expected: bool) -> None:
        if read.raw is None:
            status = Status.missing if read.gone else Status.unreadable
            self._items.append(Item(name, status, None, expected, why=read.why))
            return
        count: Counter[str] = Counter()
        try:
            raw = self._redactor.file(name, read.raw, count)
        except UnclearError as error:
            self._items.append(
                Item(name, Status.unreadable, None, expected, read.size, read.modified_at, {}, str(error))
            )
            return
        why = f"the last {len(read.raw)} of {read.size} bytes" if read.cut else None
        self._items.append(
            Item(name, _status(count, read.cut), raw, expected, read.size, read.modified_at, +count, why)
        )

    def _made(
        self, name: str, make: Callable[[], Any], write: Callable[[Any], str] | None = None, expected: bool = True
    ) -> None:
        """Something that is found out now."""
        count: Counter[str] = Counter()
        try:
            data = self._redactor.value(plain(make()), count)
            text = write(data) if write is not None else json.dumps(data, indent=1) + "\n"
        except (EngineError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error.message if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            self._items.append(Item(name, Status.unreadable, None, expected, why=self._redactor.text(why, Counter())))
            return
        raw = text.encode()
        self._items.append(Item(name, _status(count, False), raw, expected, len(raw), None, +count))

    def _report(self, base: str, run: Path, rank: int, expected: bool) -> None:
        """A report is JSON: of one that is too long the oldest chunks go, not its beginning."""
        name, path = f"{base}/ranks/rank{rank}.json", run / "ranks" / f"rank{rank}.json"
        read = read_bounded(path, REPORT_BYTES)
        if not read.cut and read.raw is not None and read.size > SMALL_BYTES:
            try:
                data = json.loads(read.raw)
                data["chunks"] = data["chunks"][-KEPT_CHUNKS:]
                read = replace(read, raw=json.dumps(data).encode())
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # damaged: as it is
        self._keep(name, read, expected)

    def _box(self, label: str, run: Path, rank: int, expected: bool) -> None:
        """A black box, whole, and decoded; copied again where the copy was made in the middle of a record."""
        name, path = f"ranks/rank{rank}.blackbox", run / "ranks" / f"rank{rank}.blackbox"
        read, problem = Read(None, gone=True), ""
        with TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            for _ in range(COPIES):
                read = read_bounded(path, SMALL_BYTES)
                if read.raw is None:
                    break
                copy.write_bytes(read.raw)
                try:
                    contents = read_box(copy)
                except BlackBoxError as error:
                    problem = error.message.replace(str(copy), path.name)
                else:
                    problem = ""
                    break
            if read.raw is None or problem:
                status = Status.missing if read.gone else Status.unreadable
                raw = read.raw if not read.cut else None  # damaged, it is evidence all the same
                self._items.append(
                    Item(
                        f"runs/{label}/{name}",
                        status,
                        raw,
                        expected,
                        read.size,
                        read.modified_at,
                        {},
                        read.why or problem,
                    )
                )
                if not read.gone:
                    self._items.append(
                        Item(f"decoded/{label}/rank{rank}.json", Status.unreadable, why=read.why or problem)
                    )
                return
        self._items.append(
            Item(f"runs/{label}/{name}", Status.collected, read.raw, expected, read.size, read.modified_at)
        )
        self._made(f"decoded/{label}/rank{rank}.json", lambda: decoded(contents))

    def _proc(self, label: str, rank: RankSeen) -> bool:
        """False if it ended meanwhile."""
        assert rank.box is not None
        name, pid, ticks = f"proc/{label}/rank{rank.rank}.json", rank.box.contents.pid, rank.box.start_ticks
        try:
            facts = liverank.read(pid, ticks)
        except liverank.GoneError as error:
            self._items.append(Item(name, Status.missing, expected=False, why=str(error)))
            return False
        except (OSError, ValueError, KeyError) as error:
            self._items.append(Item(name, Status.unreadable, why=f"{type(error).__name__}: {error}"))
            return True
        life = rank.life.value if rank.life is not None else None
        self._made(name, lambda: {"process.pid": pid, "process.life": life, **facts})
        return True

    def _lacks(self, name: str, why: str) -> None:
        self._items.append(Item(name, Status.missing, why=why))

    # Words that must not leave, and bounds -------------------------------------------------------------------------

    def _environments(self) -> Iterator[dict[str, str]]:
        """This process', and those of the ranks that live: only to know what to take out."""
        import os

        yield dict(os.environ)
        for seen in self._seen.values():
            for rank in seen.ranks:
                if rank.life in (Life.ALIVE, Life.STOPPED) and rank.box is not None:
                    yield liverank.environment(rank.box.contents.pid, rank.box.start_ticks)

    def _prompts(self) -> set[str]:
        paths = [run / "config.toml" for _, run in self.source.runs]
        if self.source.job is not None:
            paths += [self.source.job.config, self.source.job.timeline]
        found: set[str] = set()
        for path in paths:
            found |= prompts_of(read_bounded(path, SMALL_BYTES).raw or b"")
        return found

    def _within_bounds(self) -> Iterator[Item]:
        left, names = self._max_bytes, set()
        for item in self._items:
            if item.name in names:
                continue
            names.add(item.name)
            size = len(item.raw or b"")
            if size > left:
                yield item.without_room(self._max_bytes)
                continue
            left -= size
            yield item


def decoded(contents: Any) -> dict[str, Any]:
    """A black box as plain data."""
    live = contents.live
    return {
        "rank": contents.rank,
        "pid": contents.pid,
        "state": live.state.value,
        "phase": live.phase,
        "inside": live.inside,
        "groups": [vars(group) for group in contents.groups],
        "commitments": [vars(one) for one in contents.commitments],
        "collectives": [vars(one) for one in contents.collectives],
    }


def _status(count: Counter[str], cut: bool) -> Status:
    if cut:
        return Status.truncated
    return Status.redacted if count["secret"] or count["prompt"] else Status.collected
