"""The referee's loop: look, judge, record, end. See the package's docstring."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from pathlib import Path

from engine.lifecycle import RankState
from engine.referee.judge import Kind, Verdict, judge
from engine.referee.record import NAME, Record
from engine.referee.snapshot import Life, Seat, Snapshot
from engine.referee.watch import Watch

# How often it looks. A death wakes it at once; what ranks do to each other is seen within this.
POLL_MS = 16
# What ranks get to end by themselves once one has ended itself, and what those that are on their way out get.
GRACE_S = 0.2
LEAVING_S = 2.0
# How long the kernel may take to bury what was killed.
BURY_S = 10.0
LEAVING = frozenset({RankState.DRAINING, RankState.SHUTDOWN, RankState.EXITED, RankState.ABORTED})


class Referee:
    """Watches until every rank is gone, or until it is told to leave. Never touches a rank before a verdict."""

    def __init__(self, run_dir: Path, ranks: tuple[int, ...], poll_ms: int = POLL_MS) -> None:
        self.path = run_dir / NAME
        self.watch = Watch(run_dir, ranks)
        self.poll_ms = poll_ms
        self.told_to_leave = False
        self._parent = os.getppid()
        self._said: set[str] = set()

    def run(self) -> Verdict | None:
        """The verdict, or None if the job ended well or nothing could be proved."""
        previous: Verdict | None = None
        while True:
            snapshot = self.watch.look()
            self._say_unreadable()
            verdict = judge(snapshot)
            # A snapshot is not taken at one instant: what is true is still true in the next one.
            if verdict is not None and previous is not None and same(verdict, previous):
                return self._carry_out(verdict, snapshot)
            if verdict is None and (snapshot.all_gone or self.told_to_leave or self._abandoned(snapshot)):
                return None
            previous = verdict
            if verdict is None:
                self._wait(self.poll_ms)

    def _say_unreadable(self) -> None:
        for rank, why in self.watch.unreadable.items():
            if why not in self._said:
                self._said.add(why)
                print(f"referee: rank {rank} is not watched: {why}", file=sys.stderr, flush=True)

    def _wait(self, milliseconds: int) -> None:
        """Until the time is over or a rank dies."""
        poller = select.poll()
        for pidfd in self.watch.pidfds().values():
            poller.register(pidfd, select.POLLIN)
        poller.poll(milliseconds)

    def _abandoned(self, snapshot: Snapshot) -> bool:
        """Whoever started the referee is gone, and no rank is left to watch."""
        alive = any(seat.life is not Life.GONE for seat in snapshot.seats.values())
        return os.getppid() != self._parent and not alive

    def _carry_out(self, verdict: Verdict, snapshot: Snapshot) -> Verdict:
        record = Record(self.path, verdict, snapshot, time.monotonic_ns())
        record.say()
        record.write()
        killed: set[int] = set()
        start = time.monotonic()
        while not snapshot.all_gone and time.monotonic() - start < LEAVING_S + BURY_S:
            waited_s = time.monotonic() - start
            for rank, pidfd in self.watch.pidfds().items():
                if rank not in killed and waited_s >= patience_s(verdict, snapshot.seats.get(rank)):
                    # SIGKILL ends stopped processes too. The pidfd means this process and no other.
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed.add(rank)
            if not self.watch.pidfds() and len(self.watch.ranks) == len(self.watch.expected):
                break
            if not self.watch.pidfds() and (self.told_to_leave or waited_s > LEAVING_S):
                break  # a rank that never came
            self._wait(self.poll_ms)
            snapshot = self.watch.look()
        record.killed = tuple(killed)
        record.all_gone_ms = (time.monotonic_ns() - record.decided_ns) / 1e6 if not self.watch.pidfds() else None
        record.write()
        return verdict


def same(verdict: Verdict, other: Verdict) -> bool:
    return (verdict.kind, verdict.triggers, verdict.fm) == (other.kind, other.triggers, other.fm)


def patience_s(verdict: Verdict, seat: Seat | None) -> float:
    """How long a rank may live on after the verdict. None, unless a rank ended itself: then others may do so too."""
    if verdict.kind is not Kind.ENDED:
        return 0.0
    if seat is not None and seat.life is Life.ALIVE and seat.state in LEAVING:
        return LEAVING_S
    return GRACE_S


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine.referee", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the ranks' black boxes appear")
    parser.add_argument("--ranks", required=True, help="global ranks of this host, for example 0,1")
    parser.add_argument("--poll-ms", type=int, default=POLL_MS)
    options = parser.parse_args(argv)
    try:
        ranks = tuple(sorted({int(rank) for rank in options.ranks.split(",")}))
    except ValueError:
        parser.error("--ranks must be numbers with commas between")
    referee = Referee(options.run_dir, ranks, options.poll_ms)

    def leave(*_: object) -> None:
        referee.told_to_leave = True

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job; the referee sees how it ends
    return 0 if referee.run() is None else 1


if __name__ == "__main__":
    sys.exit(main())
