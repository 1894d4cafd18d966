"""Whoever started the referee: a process held by its pidfd, so that its end is seen at once and never mistaken."""

from __future__ import annotations

import os
import select

from engine.process import start_ticks


class Parent:
    """The process `pid` that was started at `ticks`; it may have ended before anybody looked.

    Its number must come from the parent itself: a referee that asks the kernel for its parent while it loads may hear
    of the one that adopted it, and would then wait for ever.
    """

    def __init__(self, pid: int, ticks: int) -> None:
        self._pidfd: int | None = None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return
        try:
            if start_ticks(pid) == ticks:
                self._pidfd = pidfd
        except (OSError, ValueError):
            pass
        if self._pidfd is None:
            os.close(pidfd)

    @classmethod
    def parse(cls, text: str) -> Parent:
        """From `PID:TICKS`. Raises ValueError."""
        pid, _, ticks = text.partition(":")
        if not (pid.isdecimal() and ticks.isdecimal() and int(pid) > 0):
            raise ValueError(text)
        return cls(int(pid), int(ticks))

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        if self._pidfd is None:
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)  # readable once the process has ended
        return bool(poller.poll(0))


def named(pid: int) -> str:
    """`PID:TICKS` of a process that lives. Raises OSError: it does not."""
    return f"{pid}:{start_ticks(pid)}"
