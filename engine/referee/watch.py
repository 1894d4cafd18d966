"""Gathers a snapshot: black boxes, process states, endings. It reads only, and nothing that it reads can block it."""

from __future__ import annotations

import json
import os
import select
import time
from dataclasses import replace
from pathlib import Path

from engine.blackbox import BlackBoxError, Box, Collective, Live, Members, unpack_collective
from engine.lifecycle import RankState
from engine.process import start_ticks
from engine.referee.find import Finder
from engine.referee.ledgers import Ledgers
from engine.referee.snapshot import Ending, Life, Seat, Snapshot

# A stop must be seen twice, this far apart: profilers stop a process for a moment.
CONFIRM_STOP_NS = 50_000_000
# The kernel's word on a process is asked for at most this often; its death wakes the referee at once.
STATE_EVERY_NS = 40_000_000
# A referee that slept longer than this was itself stopped: what it saw before is no first sighting any more.
SLEPT_NS = 500_000_000
LEAVING = (RankState.EXITED, RankState.ABORTED)


class RankWatch:
    """One rank, from the moment its black box appears. Holds its pidfd, so that its id cannot come to mean another.

    Raises:
        BlackBoxError: the box cannot be read.
        ProcessLookupError: its process is gone, and was before the box could be of this job.
    """

    def __init__(self, rank: int, run_dir: Path, born_ns: int) -> None:
        self.rank = rank
        self._report = run_dir / "ranks" / f"rank{rank}.json"
        self.box = Box(run_dir / "ranks" / f"rank{rank}.blackbox")
        self.pidfd: int | None = None
        self._stat: int | None = None
        self._poller = select.poll()
        try:
            self._take(self.box.pid)
        except OSError:
            if self.box.made_ns < born_ns:  # of an earlier job in the same directory
                self.close()
                self.box.close()
                raise ProcessLookupError(self.box.pid) from None
        gone = self.pidfd is None
        self.seat = Seat(rank, self.box.pid, Life.GONE if gone else Life.ALIVE, time.monotonic_ns() if gone else 0)
        self._groups: tuple[Members, ...] = ()
        self._seen = 0
        self._asked_ns = 0
        self._stopped_ns = 0
        self._still = b""

    def _take(self, pid: int) -> None:
        self.pidfd = os.pidfd_open(pid)
        self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        if start_ticks(pid) != self.box.start_ticks:
            self.close()
            raise ProcessLookupError(pid)
        self._poller.register(self.pidfd, select.POLLIN)

    def close(self) -> None:
        """Give up the handles of the process."""
        for fd in (self.pidfd, self._stat):
            if fd is not None:
                os.close(fd)
        self.pidfd = self._stat = None

    def look(self, ledgers: Ledgers, now_ns: int, slept: bool) -> Seat:
        """The rank as it is now."""
        before = self.seat.life
        self._ask_kernel(now_ns, slept)
        words = self.box.peek()
        # Most looks find a rank where it was. One that leaves is looked at in full, until its report is there.
        if words == self._still and self.seat.life is before is not Life.GONE and self.seat.state not in LEAVING:
            return self.seat
        live = self.box.live()
        if live.groups != len(self._groups):
            self._groups = self.box.groups(live.groups)
            ledgers.know(self._groups)
        if live.collectives != self._seen:
            records = self.box.collectives(self._seen, live.collectives)
            self._seen = live.collectives
            ledgers.add(self.rank, records)
        self._refresh(live, ledgers.last.get(self.rank), now_ns)
        self._still = words
        return self.seat

    def _refresh(self, live: Live, last: bytes | None, now_ns: int) -> None:
        seat = self.seat
        record: Collective | None = seat.last
        if last is not None and (record is None or record.seq != live.collectives):
            record = unpack_collective(last)
        ending, ending_ns = seat.ending, seat.ending_ns
        if ending is None and (seat.life is Life.GONE or live.state in LEAVING):
            ending = self._read_ending()
            ending_ns = now_ns if ending is not None else 0
        self.seat = replace(
            seat,
            state=live.state,
            state_ns=live.state_ns,
            phase=live.phase,
            ending=ending,
            ending_ns=ending_ns,
            inside=record if record is not None and record.seq == live.inside else self._entered(live.inside),
            last=record,
            groups={group.name: group for group in self._groups},
            counts={group.name: count for group, count in zip(self._groups, live.counts, strict=True)},
        )

    def _entered(self, seq: int) -> Collective | None:
        """A collective that is not the last that the rank entered; None if there is none."""
        raw = self.box.collectives(seq - 1, seq) if seq else []
        return unpack_collective(raw[0]) if raw else None

    def _ask_kernel(self, now_ns: int, slept: bool) -> None:
        if self.pidfd is None or self._stat is None:
            return
        if self._poller.poll(0):  # a pidfd is readable once its process has ended
            status = _state(self._stat)[1]
            # 0 is also what the kernel shows to those who may not know.
            self.seat = replace(self.seat, life=Life.GONE, changed_ns=now_ns, wait_status=status or None)
            self.close()
            return
        if now_ns - self._asked_ns < STATE_EVERY_NS:
            return
        self._asked_ns = now_ns
        if _state(self._stat)[0] != "T":
            self._stopped_ns = 0
            life = Life.ALIVE
        else:
            if not self._stopped_ns or slept:
                self._stopped_ns = now_ns
            life = Life.STOPPED if now_ns - self._stopped_ns >= CONFIRM_STOP_NS else Life.ALIVE
        if life is not self.seat.life:
            self.seat = replace(self.seat, life=life, changed_ns=self._stopped_ns)

    def _read_ending(self) -> Ending | None:
        """What the rank wrote about its end; None if there is nothing, or nothing readable, of this process."""
        try:
            report = json.loads(self._report.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(report, dict) or report.get("pid") != self.box.pid:
            return None
        code, error = report.get("exit_code"), report.get("error")
        if not isinstance(code, int):
            return None
        return Ending(code, error if isinstance(error, dict) else None)


class Watch:
    """All local ranks: those named, or `local` of them, to be found by their black boxes (see `Finder`)."""

    def __init__(
        self,
        run_dir: Path,
        ranks: tuple[int, ...] = (),
        *,
        local: int = 0,
        carrying: str | None = None,
        keep: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.expected = ranks
        self.ranks: dict[int, RankWatch] = {}
        self.slept = False
        self.unreadable: dict[int, str] = {}
        self._born_ns = time.monotonic_ns()
        self._looked_ns = self._born_ns
        self._searched_ns = 0
        self._finder = Finder(run_dir, local, self._born_ns, carrying) if local else None
        self.ledgers = Ledgers(ranks, complete=self.to_find == 0, keep=keep)

    @property
    def to_find(self) -> int:
        """How many local ranks are still to be found; which ones they are is not known."""
        return self._finder.count - len(self.expected) if self._finder is not None else 0

    def look(self) -> Snapshot:
        """The moment's snapshot. A rank whose box cannot be read is left out: unknown."""
        now_ns = time.monotonic_ns()
        self.slept = slept = now_ns - self._looked_ns > SLEPT_NS
        self._looked_ns = now_ns
        if self.to_find and now_ns - self._searched_ns >= STATE_EVERY_NS:
            self._search(now_ns)
        for rank in self.expected:
            if rank not in self.ranks:
                self._meet(rank)
        seats = {}
        for rank, watch in self.ranks.items():
            try:
                seats[rank] = watch.look(self.ledgers, now_ns, slept)
            except (BlackBoxError, OSError) as error:
                self.unreadable[rank] = str(error)
        return Snapshot(now_ns, self.expected, seats, self.ledgers.differences(seats), self.to_find)

    def _search(self, now_ns: int) -> None:
        assert self._finder is not None
        self._searched_ns = now_ns
        found = self._finder.find(frozenset(self.expected))
        if found:
            self.expected = tuple(sorted((*self.expected, *found)))
            self.ledgers.adopt(self.expected, complete=self.to_find == 0)

    def pidfds(self) -> dict[int, int]:
        """Of the ranks that are not known to be gone."""
        return {rank: watch.pidfd for rank, watch in self.ranks.items() if watch.pidfd is not None}

    def _meet(self, rank: int) -> None:
        try:
            self.ranks[rank] = RankWatch(rank, self.run_dir, self._born_ns)
        except BlackBoxError as error:
            if (self.run_dir / "ranks" / f"rank{rank}.blackbox").exists():
                self.unreadable[rank] = str(error)
        except ProcessLookupError:
            pass  # an old box; a new one will take its place
        else:
            self.unreadable.pop(rank, None)


def _state(stat: int) -> tuple[str, int]:
    """State letter and wait status of `/proc/PID/stat`; ("X", 0) once the process was reaped."""
    try:
        raw = os.pread(stat, 4096, 0)
    except OSError:
        return "X", 0
    fields = raw[raw.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[49])
