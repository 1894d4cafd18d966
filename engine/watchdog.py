"""Deadlines that end this rank from outside its main thread, and the heartbeat that keeps idle peers calm.

The main thread may be stuck inside a backend that never returns, so a deadline is kept by a thread of its own, which
records why and leaves by `os._exit`: `sys.exit` in a thread ends the thread alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.lifecycle import RankExit


@dataclass(frozen=True)
class Deadline:
    """When (monotonic seconds) a wait is over its budget, what the rank dies of then, and of which failure mode."""

    name: str
    at_s: float
    budget_s: float
    exit_code: RankExit
    fm: str | None = None


class Watchdog:
    """Watches named deadlines. `on_expired` records, and must not return: it ends the process.

    An idle healthy job never trips: waiting ranks hear a heartbeat, and each frame sets the deadline anew.
    """

    def __init__(self, on_expired: Callable[[Deadline], None]) -> None:
        self._on_expired = on_expired
        self._deadlines: dict[str, Deadline] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def budget(self, name: str, budget_s: float, exit_code: RankExit, fm: str | None = None) -> Iterator[None]:
        """The body must end within `budget_s` seconds."""
        self.arm(name, budget_s, exit_code, fm)
        try:
            yield
        finally:
            self.disarm(name)

    def arm(self, name: str, budget_s: float, exit_code: RankExit, fm: str | None = None) -> None:
        deadline = Deadline(name, time.monotonic() + budget_s, budget_s, exit_code, fm)
        with self._changed:
            self._deadlines[name] = deadline
            self._changed.notify()

    def disarm(self, name: str) -> None:
        with self._changed:
            self._deadlines.pop(name, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(5.0)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                first = min(self._deadlines.values(), key=lambda deadline: deadline.at_s, default=None)
                if first is not None and time.monotonic() >= first.at_s:
                    # Disarmed while held: nobody can come back in time from here on.
                    del self._deadlines[first.name]
                    self._on_expired(first)
                    continue
                self._changed.wait(None if first is None else max(0.0, first.at_s - time.monotonic()))


class Heartbeat:
    """Calls `beat` every `interval_s` seconds while the owner does not hold it.

    The owner holds it from the preparation of a frame to the end of phase B, so a beat never comes between a
    header and its payload, and never while another thread is inside the group.
    """

    def __init__(self, interval_s: float, beat: Callable[[], None]) -> None:
        self.busy = threading.Lock()
        self._interval_s = interval_s
        self._beat = beat
        self._stop = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The body has `busy`. If it fails there is no beat any more: peers may be in the middle of phase B."""
        with self.busy:
            try:
                yield
            except BaseException:
                self._stop.set()
                raise

    def stop(self) -> None:
        """No beat after this returns."""
        self._stop.set()
        self._thread.join(self._interval_s + 5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self.busy:
                if self._stop.is_set():
                    return
                try:
                    self._beat()
                except Exception as error:  # noqa: BLE001 - latched here, judged by the owner at its next frame
                    self.failure = error
                    return
