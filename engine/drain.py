"""SIGTERM and SIGINT: the first means drain, the second means abort.

Python runs its handlers in the main thread only, which may be stuck inside a collective. The signal's number is
therefore written to a pipe by the interpreter's own C handler and read by a thread that is never stuck.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.control import NOT_ASKED
from engine.errors import ConfigError
from engine.process import Process

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DrainRequest:
    """Set by the first signal. `on_first` and `on_second` get its name and run in the reader's thread.

    Until the loop begins it, which is its point of no return, it can be taken back; `on_taken_back` hears of that.
    Make it in the main thread, once in a process: it takes the process' signal handlers.
    """

    def __init__(
        self,
        on_first: Callable[[str], None],
        on_second: Callable[[str], None],
        on_taken_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._requested = threading.Event()
        self._begun = False
        self._turn = threading.Lock()
        self._on_taken_back = on_taken_back
        self._on_first = on_first
        self._on_second = on_second
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # without a Python handler, the C handler would not be installed
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="signals", daemon=True).start()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def begin(self, ended: bool = False) -> bool:
        """At the end of a chunk, by the loop: whether to drain now (or, `ended`, that the stream ends by itself)."""
        with self._turn:
            self._begun = self._begun or ended or self._requested.is_set()
            return self._begun

    def take_back(self) -> str | None:
        """Forget the request, and let the stream go on. Returns why not, where that cannot be."""
        with self._turn:
            if self._begun:
                return "it is past its point of no return: what was in flight is done, and the ranks leave"
            if not self._requested.is_set():
                return NOT_ASKED
            self._requested.clear()
            self._on_taken_back()
            return None

    def _read(self) -> None:
        while True:
            for number in os.read(self._reader, 16):
                if number not in SIGNALS:
                    continue
                name = signal.Signals(number).name
                with self._turn:
                    second = self._requested.is_set()
                    if not second:
                        self._requested.set()
                        self._on_first(name)
                if second:
                    self._on_second(name)


@dataclass(frozen=True)
class Supervisor:
    """The process that answers for this job."""

    process: Process

    @classmethod
    def parse(cls, text: str) -> Supervisor:
        """From `PID:TICKS`. Raises ConfigError."""
        try:
            return cls(Process.parse(text))
        except ValueError as error:
            raise ConfigError(f"--supervisor must be PID:TICKS, is {text!r}", code="TP-1040") from error

    def watch(self) -> None:
        """From now on: when it is gone, this process tells itself to drain. On rank 0 only, which leads the drain."""
        threading.Thread(target=self._wait, name="supervisor", daemon=True).start()

    def _wait(self) -> None:
        pidfd = self.process.open()
        if pidfd is not None:
            select.select([pidfd], [], [])  # readable once the process has ended
        print("rank 0: the supervisor is gone: nobody could end this job any more", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
