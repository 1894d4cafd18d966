"""A process named for good: its id, when it started, and the boot it belongs to."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, this names it for good.

    Raises:
        OSError: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def boot_id() -> str:
    """Another after each boot: process ids and monotonic clocks of one boot mean nothing in the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Process:
    """An id alone may be given to another process later; with its start, in clock ticks since boot, it may not."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises OSError: there is no such process."""
        return cls(pid, start_ticks(pid))

    @classmethod
    def parse(cls, text: str) -> Process:
        """From `PID:TICKS`, as `str` writes it. Raises ValueError."""
        pid, _, ticks = text.partition(":")
        if not (pid.isdecimal() and ticks.isdecimal() and int(pid) > 0):
            raise ValueError(f"no PID:TICKS: {text!r}")
        return cls(int(pid), int(ticks))

    def __str__(self) -> str:
        return f"{self.pid}:{self.start_ticks}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Process:
        return cls(int(data["pid"]), int(data["start_ticks"]))

    def to_dict(self) -> dict[str, int]:
        return {"pid": self.pid, "start_ticks": self.start_ticks}

    def alive(self) -> bool:
        """Whether this very process lives; one that ended and was not waited for does not."""
        return self.letter() not in ("", "Z", "X")

    def age_s(self) -> float:
        """Seconds since it started."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_ticks / os.sysconf("SC_CLK_TCK")

    def letter(self) -> str:
        """The kernel's letter for its state: T is stopped, D waits for a device; empty: it is gone."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return ""
        fields = stat[stat.rindex(b")") + 2 :].split()
        return fields[0].decode() if int(fields[19]) == self.start_ticks else ""

    def rss_bytes(self) -> int | None:
        """Memory it holds now; None if it is gone."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)

    def open(self) -> int | None:
        """A pidfd of this very process, readable once it has ended; the caller closes it. None: it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return None
        if self.alive():
            return pidfd
        os.close(pidfd)
        return None

    def send(self, number: signal.Signals) -> bool:
        """A signal to this very process; False if it is gone."""
        pidfd = self.open()
        if pidfd is None:
            return False
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
                return True
            return False
        finally:
            os.close(pidfd)
