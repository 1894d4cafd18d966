"""The other ranks of this host, as processes: a rank whose wait ran out asks here whether the peer still lives.

A backend need not notice that a peer is gone. NCCL does not; gloo misses it when it sends in the moment between the
peer's end and its own look at the socket. The wait then ends by its budget, and the kernel knows more than the budget.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.process import Process, boot_id

STOPPED = ("T", "t")


@dataclass(frozen=True)
class Neighbours:
    """By rank. One on another host, or in another namespace of process ids, is not in it: nothing is known of it."""

    processes: Mapping[int, Process] = field(default_factory=dict)

    @classmethod
    def read(cls, rank: int, words: Mapping[int, bytes]) -> Neighbours:
        """Of what each rank said with `introduction`, those who live where this one does."""
        here, _ = _parse(words[rank])
        found = {peer: _parse(word) for peer, word in words.items() if peer != rank}
        return cls({peer: process for peer, (place, process) in found.items() if process and place == here})

    def gone(self) -> list[int]:
        return [rank for rank, process in self.processes.items() if not process.alive()]

    def stopped(self) -> list[int]:
        """By a signal or a debugger."""
        return [rank for rank, process in self.processes.items() if process.letter() in STOPPED]


def introduction() -> bytes:
    """Where this process is, and which it is there."""
    return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')} {Process.of(os.getpid())}".encode()


def _parse(word: bytes) -> tuple[str, Process | None]:
    """What another version says differently is no reason to end here: the parity check will name the versions."""
    place, _, process = word.decode(errors="replace").partition(" ")
    try:
        return place, Process.parse(process)
    except ValueError:
        return place, None
