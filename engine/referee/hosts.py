"""What referees of one job tell each other, through the job's store. In threads of its own: looking waits for nobody.

The rendezvous endpoint is a key-value store that every host can reach. Each referee takes a number there, its *slot*,
and keeps its newest summary under it. The first verdict stands: it is put in by compare-and-set, and a thread of each
referee waits for that key alone, so that a verdict is heard as soon as it is there.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections import deque
from typing import Any

from engine.referee.joint import Remote
from engine.referee.judge import Verdict
from engine.referee.summary import Summary, decode, decode_verdict, encode, encode_verdict

EVERY_S = 0.1
# With many hosts each reads many summaries: the store serves them all.
EVERY_S_PER_HOST = 0.005
PROBE_S = 2.0
# An answer that takes longer is given up, and the connection with it.
ANSWER_S = 5.0
MAX_HOSTS = 1024
# No single round counts as more quiet than this: a round that took long was slow, not quiet.
QUIET_ROUND_NS = 500_000_000
UNREACHED_ROUND_NS = int((PROBE_S + 0.5) * 1e9)
# A job that ends takes its store along; only a store that stays away is worth a word.
SAY_AFTER_NS = 1_000_000_000


class Hosts:
    """The other hosts of a job. `told` is the verdict that stands, and who gave it (None: this host).

    Args:
        endpoint: HOST:PORT of the store.
        job: what all hosts of the job call it; with `attempt`, it keeps jobs at one store apart.
    """

    def __init__(self, endpoint: str, job: str, attempt: int = 0, host: str | None = None) -> None:
        address, _, port = endpoint.rpartition(":")
        self.endpoint = endpoint
        self.host = host or socket.gethostname()
        self.slot: int | None = None
        self.told: tuple[Verdict, str | None] | None = None
        self.reached = False  # the store answers
        self.words: deque[str] = deque(maxlen=64)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # rings when there is a verdict
        self._address, self._port = address.strip("[]"), int(port)
        self._prefix = f"tpctl/referee/{job}/{attempt}"
        self._remotes: dict[int, Remote] = {}
        self._refused: dict[int, str] = {}
        self._summary: Summary | None = None
        self._published = -1
        self._proposal: tuple[Verdict, bytes] | None = None
        self._turn_ns = time.monotonic_ns()
        self._answered_ns = 0
        self._gone_ns = 0
        self._wake = threading.Event()
        self._done = threading.Condition()
        self._connected = threading.Event()
        for name in ("exchange", "listen"):
            threading.Thread(target=getattr(self, f"_{name}"), name=name, daemon=True).start()

    def remotes(self) -> tuple[Remote, ...]:
        """The other hosts as they are known now."""
        return tuple(self._remotes.values())

    def unanswered_ns(self) -> int:
        """How long the store has not answered; 0 before it ever did."""
        return time.monotonic_ns() - self._answered_ns if self._answered_ns else 0

    def publish(self, summary: Summary) -> None:
        """Hand over the newest summary; it goes out with the next round."""
        self._summary = summary

    def hurry(self) -> None:
        """Make the next round now."""
        self._wake.set()

    def propose(self, verdict: Verdict) -> None:
        """Put in a verdict, unless there is one. `told` has the one that stands, as soon as the store answers."""
        self._proposal = (verdict, encode_verdict(verdict, self.host))
        self._wake.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was handed over last is out; False if the store does not answer in time."""
        summary = self._summary
        self._wake.set()
        with self._done:
            return self._done.wait_for(
                lambda: self._proposal is None and (summary is None or self._published >= summary.look), timeout_s
            )

    def slept(self) -> None:
        """This referee was stopped: what others said meanwhile is still to be read, and nobody was quiet."""
        self._remotes = {slot: _heard(remote, remote.summary) for slot, remote in self._remotes.items()}
        self._answered_ns = self._answered_ns and time.monotonic_ns()

    def _exchange(self) -> None:
        store = None
        while True:
            try:
                if store is None:
                    store = self._connect()
                    self._connected.set()
                self._round(store)
                self._reach(True)
            except (OSError, RuntimeError) as error:  # torch's store errors are RuntimeErrors
                store = None
                self._reach(False, error)
            except ImportError as error:
                self.words.append(f"other hosts are not heard: {error}")
                return
            self._wake.wait(EVERY_S + EVERY_S_PER_HOST * len(self._remotes))
            self._wake.clear()

    def _listen(self) -> None:
        while self.told is None:
            self._connected.wait()
            with contextlib.suppress(OSError, RuntimeError):
                store = self._connect()
                store.wait(["verdict"], datetime.timedelta(days=1))
                self._hear(store.get("verdict"))
                return
            self._connected.clear()  # until the exchange has reached the store again

    def _connect(self) -> Any:
        # A plain connection first: whether somebody listens is known at once, and torch has nothing to log.
        socket.create_connection((self._address, self._port), PROBE_S).close()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from engine.comm.group import dist

        torch_dist = dist()
        store = torch_dist.TCPStore(
            self._address,
            self._port,
            None,
            is_master=False,
            timeout=datetime.timedelta(seconds=ANSWER_S),
            wait_for_workers=False,
        )
        return torch_dist.PrefixStore(self._prefix, store)

    def _round(self, store: Any) -> None:
        proposal, summary = self._proposal, self._summary
        if proposal is not None:
            _, raw = proposal
            self._hear(store.compare_set("verdict", "", raw.decode()))
            self._proposal = None
        if summary is not None and summary.look != self._published:
            if self.slot is None or (not self.reached and not store.check([f"host/{self.slot}"])):
                self.slot = store.add("hosts", 1)
                self._remotes = {}
            store.set(f"host/{self.slot}", encode(summary).decode())
            with self._done:
                self._published = summary.look
                self._done.notify_all()
        for slot in range(1, min(store.add("hosts", 0), MAX_HOSTS) + 1):
            if slot != self.slot and (slot in self._remotes or store.check([f"host/{slot}"])):
                self._read(slot, store.get(f"host/{slot}"))

    def _read(self, slot: int, raw: bytes) -> None:
        now_ns = time.monotonic_ns()
        known = self._remotes.get(slot)
        try:
            summary = decode(raw)
        except ValueError as error:
            # Not seen: what it said before does not stand in for what it says now.
            self._remotes = {other: remote for other, remote in self._remotes.items() if other != slot}
            if self._refused.get(slot) != str(error):
                self._refused[slot] = str(error)
                self.words.append(f"the summary of host number {slot} is refused: {error}")
            return
        if known is None:
            remote = Remote(slot, summary, now_ns - summary.t_ns)
        elif summary.look != known.summary.look:
            # The way takes time; the smallest difference is nearest to the truth.
            remote = _heard(known, summary, min(known.offset_ns, now_ns - summary.t_ns))
        else:
            quiet_ns = min(now_ns - self._turn_ns, QUIET_ROUND_NS)
            remote = Remote(slot, summary, known.offset_ns, known.quiet_ns + quiet_ns)
        self._remotes = self._remotes | {slot: remote}

    def _reach(self, reached: bool, error: Exception | None = None) -> None:
        """Account for a round that ended, one way or the other."""
        now_ns = time.monotonic_ns()
        if reached:
            self._answered_ns = now_ns
            if self._gone_ns and now_ns - self._gone_ns >= SAY_AFTER_NS and self._published >= 0:
                self.words.append(f"the job's store at {self.endpoint} answers again")
            self._gone_ns = 0
        elif self._published >= 0 and isinstance(error, OSError):  # it was there, and nobody listens any more
            self._gone_ns = self._gone_ns or now_ns
            passed_ns = min(now_ns - self._turn_ns, UNREACHED_ROUND_NS)
            self._remotes = {
                slot: Remote(slot, remote.summary, remote.offset_ns, remote.quiet_ns + passed_ns)
                for slot, remote in self._remotes.items()
            }
            if now_ns - self._gone_ns >= SAY_AFTER_NS > self._turn_ns - self._gone_ns:
                self.words.append(
                    f"the job's store at {self.endpoint} is gone ({error}); going on with this host's ranks alone"
                )
        self.reached = reached
        self._turn_ns = now_ns

    def _hear(self, raw: bytes) -> None:
        if self._proposal is not None and raw == self._proposal[1]:
            self._tell(self._proposal[0], None)
            return
        try:
            verdict, host = decode_verdict(raw, time.monotonic_ns())
        except ValueError as error:
            self.words.append(f"a verdict in the job's store is refused: {error}")
            return
        self._tell(verdict, host)

    def _tell(self, verdict: Verdict, host: str | None) -> None:
        with self._done:
            if self.told is None:  # both threads may hear of it
                self.told = (verdict, host)
        os.eventfd_write(self.bell, 1)


def _heard(remote: Remote, summary: Summary, offset_ns: int | None = None) -> Remote:
    return Remote(remote.slot, summary, remote.offset_ns if offset_ns is None else offset_ns)
