"""The referee's loop: look, judge, record, end. See the package's docstring."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine.lifecycle import RankState
from engine.process import Process
from engine.referee.hosts import Hosts
from engine.referee.joint import Caution, Remote, Waits, join, parted, seen, silence
from engine.referee.judge import Kind, Verdict, judge
from engine.referee.record import NAME, Record
from engine.referee.snapshot import Life, Seat, Snapshot
from engine.referee.summary import Summary
from engine.referee.watch import Watch

# How often it looks. A death wakes it at once; what ranks do to each other is seen within this.
POLL_MS = 16
# What ranks get to end by themselves once one has ended itself, and what those that are on their way out get.
GRACE_S = 0.2
LEAVING_S = 2.0
# How long the kernel may take to bury what was killed.
BURY_S = 10.0
# How often all hosts' ranks are judged together; what is local is judged in every look.
JOIN_EVERY_NS = 50_000_000
# How long the store may take to say which verdict came first, and to take the last summary.
AGREE_MS = 300
FLUSH_S = 0.5
# How long a verdict that could not be put there yet is worth waiting for at the end.
LAST_WORD_S = 3.0
# How long other hosts get to tell why this host's ranks ended badly.
LINGER_NS = 1_500_000_000
# How long a host may be silent while a rank waits for it.
STORE_LOST_S = 10.0
LEAVING = frozenset({RankState.DRAINING, RankState.SHUTDOWN, RankState.EXITED, RankState.ABORTED})


class Referee:
    """Watches until every rank is gone, or until it is told to leave. Never touches a rank before a verdict.

    Args:
        watch: the local ranks.
        record: where the verdict is written.
        hosts: the other hosts of the job, if it has any.
        lost_s: how long a host may be silent while a local rank waits for it.
        parent: whoever started the referee; if not given, the process that is its parent now.
    """

    def __init__(
        self,
        watch: Watch,
        record: Path,
        hosts: Hosts | None = None,
        poll_ms: int = POLL_MS,
        lost_s: float = STORE_LOST_S,
        parent: Process | None = None,
    ) -> None:
        self.record = record
        self.watch = watch
        self.hosts = hosts
        self.poll_ms = poll_ms
        self.told_to_leave = False
        self._lost_ns = int(lost_s * 1e9)
        self._parent = parent
        self._adopter = os.getppid()
        self._said: set[str] = set()
        self._looks = 0
        self._joined_ns = 0
        self._over_ns = 0
        self._decided = False
        self._caution = Caution()
        self._waits = Waits()

    def run(self) -> Verdict | None:
        """The verdict, or None if the job ended well or nothing could be proved."""
        while True:
            known = self.hosts.remotes() if self.hosts is not None else ()
            local = self._look()
            verdict = judge(local)
            snapshot = local
            if self.hosts is not None:
                if self.hosts.told is not None:
                    return self._carry_out(*self.hosts.told, join(local, known))
                pending = verdict is not None or self._caution.pending
                if not pending and local.t_ns - self._joined_ns < JOIN_EVERY_NS and not self._is_over(local):
                    self._wait(self.poll_ms)
                    continue
                snapshot, verdict = self._join(self.hosts, local, known)
            # A snapshot is not taken at one instant: what is true is still true in the next one.
            if self._caution.allows(verdict, local, self._looks, known) and verdict is not None:
                return self._agree(verdict, snapshot)
            if verdict is None and self._may_leave(local):
                return None
            if self.hosts is not None and self._caution.times == 1 and verdict is not None:
                self.hosts.hurry()  # a new suspicion; the others' word is wanted soon
            if verdict is None or self._caution.times > 1:
                self._wait(self.poll_ms)

    def leave(self) -> None:
        """Tell the other hosts how it ended here."""
        if self.hosts is not None:
            self._publish(self.hosts, self._look(), self.hosts.remotes(), leaving=True)
            self.hosts.flush(FLUSH_S if self.hosts.told is not None or not self._decided else LAST_WORD_S)
            self._say_all()

    def _look(self) -> Snapshot:
        self._looks += 1
        local = self.watch.look()
        self._say_all()
        return local

    def _join(self, hosts: Hosts, local: Snapshot, known: tuple[Remote, ...]) -> tuple[Snapshot, Verdict | None]:
        """All ranks of all hosts, and what they prove."""
        self._joined_ns = local.t_ns
        self._caution.slot = hosts.slot
        if self.watch.slept:
            hosts.slept()
        self._waits.note(local, self.watch.slept)
        snapshot = join(local, known)
        far = [seat for rank, seat in snapshot.seats.items() if rank not in local.seats]
        self.watch.ledgers.meet(far)
        snapshot = replace(snapshot, differences=self.watch.ledgers.differences(snapshot.seats))
        self._publish(hosts, local, known)
        verdict = (
            parted(local, known, hosts.unanswered_ns(), hosts.endpoint)
            or judge(snapshot)
            or silence(local, snapshot, known, self._waits, self._lost_ns)
        )
        return snapshot, verdict

    def _publish(self, hosts: Hosts, local: Snapshot, known: tuple[Remote, ...], leaving: bool = False) -> None:
        seats = tuple(local.seats.values())
        hosts.publish(Summary(hosts.host, self._looks, local.t_ns, seats, seen(known), leaving))

    def _agree(self, verdict: Verdict, snapshot: Snapshot) -> Verdict:
        """With other hosts, the verdict that came first to the store stands. One that cannot be put there stands too,
        for this host."""
        told: tuple[Verdict, str | None] = (verdict, None)
        if self.hosts is not None:
            self.hosts.propose(verdict)  # if the store cannot be reached yet, it is put there before this one leaves
            poller = select.poll()
            poller.register(self.hosts.bell, select.POLLIN)
            poller.poll(AGREE_MS)
            told = self.hosts.told or told
        self._decided = True
        return self._carry_out(*told, snapshot)

    def _may_leave(self, local: Snapshot) -> bool:
        """Everything is over here. After a bad end, other hosts get a moment to say why."""
        if not self._is_over(local):
            return False
        self._over_ns = self._over_ns or local.t_ns
        bad = any(
            seat.life is Life.GONE and (seat.ending is None or seat.ending.exit_code != 0)
            for seat in local.seats.values()
        )
        return self.hosts is None or not bad or local.t_ns - self._over_ns >= LINGER_NS

    def _is_over(self, local: Snapshot) -> bool:
        return local.all_gone or self.told_to_leave or self._abandoned(local)

    def _say_all(self) -> None:
        """Each thing once."""
        found = [f"rank {rank} is not watched: {why}" for rank, why in self.watch.unreadable.items()]
        while self.hosts is not None and self.hosts.words:
            found.append(self.hosts.words.popleft())
        for words in found:
            if words not in self._said:
                self._said.add(words)
                print(f"referee: {words}", file=sys.stderr, flush=True)

    def _wait(self, milliseconds: int) -> None:
        """Until the time is over, a rank dies or a verdict is told."""
        poller = select.poll()
        for pidfd in self.watch.pidfds().values():
            poller.register(pidfd, select.POLLIN)
        if self.hosts is not None and self.hosts.told is None:
            poller.register(self.hosts.bell, select.POLLIN)
        poller.poll(milliseconds)

    def _abandoned(self, local: Snapshot) -> bool:
        """Whoever started the referee is gone, and no rank is left to watch."""
        alive = any(seat.life is not Life.GONE for seat in local.seats.values())
        if alive:
            return False
        return not self._parent.alive() if self._parent is not None else os.getppid() != self._adopter

    def _carry_out(self, verdict: Verdict, told_by: str | None, snapshot: Snapshot) -> Verdict:
        hosts = {rank: remote.summary.host for remote in self._known() for rank in remote.summary.ranks}
        record = Record(self.record, verdict, snapshot, time.monotonic_ns(), told_by=told_by, hosts=hosts)
        record.say()
        record.write()
        killed: set[int] = set()
        start = time.monotonic()
        local = self._look()
        while not local.all_gone and time.monotonic() - start < LEAVING_S + BURY_S:
            waited_s = time.monotonic() - start
            for rank, pidfd in self.watch.pidfds().items():
                if rank not in killed and waited_s >= patience_s(verdict, local.seats.get(rank)):
                    # SIGKILL ends stopped processes too. The pidfd means this process and no other.
                    with contextlib.suppress(ProcessLookupError):  # it went by itself since the last look
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed.add(rank)
            if not self.watch.pidfds() and not self.watch.to_find and len(self.watch.ranks) == len(self.watch.expected):
                break
            if not self.watch.pidfds() and (self.told_to_leave or waited_s > LEAVING_S):
                break  # a rank that never came
            self._wait(self.poll_ms)
            local = self._look()
            if self.hosts is not None:
                self._publish(self.hosts, local, self._known())
        record.killed = tuple(killed)
        record.all_gone_ms = (time.monotonic_ns() - record.decided_ns) / 1e6 if not self.watch.pidfds() else None
        record.write()
        return verdict

    def _known(self) -> tuple[Remote, ...]:
        return self.hosts.remotes() if self.hosts is not None else ()


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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ranks", help="global ranks of this host, for example 0,1")
    which.add_argument("--local", type=int, default=0, help="how many ranks of this host to find, by their black boxes")
    parser.add_argument("--carrying", metavar="NAME=VALUE", help="found ranks must have this in their environment")
    parser.add_argument("--store", metavar="HOST:PORT", help="the job's store, where its other hosts are met")
    parser.add_argument("--job", default="job", help="what all hosts call the job")
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--store-lost-s", type=float, default=STORE_LOST_S, help="how long a host may be silent")
    parser.add_argument("--record", type=Path, help="where the verdict is written; RUN_DIR/referee.json by default")
    parser.add_argument("--parent", metavar="PID:TICKS", help="without whom, and without ranks, the referee ends")
    parser.add_argument("--poll-ms", type=int, default=POLL_MS)
    options = parser.parse_args(argv)
    try:
        ranks = tuple(sorted({int(rank) for rank in options.ranks.split(",")})) if options.ranks else ()
    except ValueError:
        parser.error("--ranks must be numbers with commas between")
    if not ranks and options.local < 1:
        parser.error("--local must be at least 1")
    try:
        hosts = Hosts(options.store, options.job, options.attempt) if options.store else None
    except ValueError:
        parser.error("--store must be HOST:PORT")
    try:
        parent = Process.parse(options.parent) if options.parent else None
    except ValueError:
        parser.error("--parent must be PID:TICKS")
    watch = Watch(options.run_dir, ranks, local=options.local, carrying=options.carrying, keep=hosts is not None)
    referee = Referee(
        watch, options.record or options.run_dir / NAME, hosts, options.poll_ms, options.store_lost_s, parent
    )

    def leave(*_: object) -> None:
        referee.told_to_leave = True

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job; the referee sees how it ends
    verdict = referee.run()
    referee.leave()
    return 0 if verdict is None else 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a thread may wait inside the store's client for ever
