"""Finds the ranks of this host by the black boxes they make. A run directory may be shared by several hosts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.blackbox import BlackBoxError, Box
from engine.process import start_ticks

NAME = re.compile(r"rank(\d{1,6})\.blackbox")


class Finder:
    """Looks for `count` ranks whose processes live here.

    A process id and its start are this host's only, so a box of another host is not taken for one of ours. Where
    several launches share a machine, `carrying` is an entry of the environment (`NAME=VALUE`) that only ours have;
    without it, a box counts if it was made after the referee was born.
    """

    def __init__(self, run_dir: Path, count: int, born_ns: int, carrying: str | None = None) -> None:
        self.count = count
        self._ranks = run_dir / "ranks"
        self._born_ns = born_ns
        self._carrying = carrying.encode() if carrying is not None else None
        self._refused: dict[str, int] = {}  # inode by name: a new box is a new file

    def find(self, known: frozenset[int]) -> list[int]:
        """Ranks that are here and not yet known, `count` in all at most."""
        try:
            boxes = sorted((entry.name, entry.inode(), entry.path) for entry in os.scandir(self._ranks))
        except OSError:
            return []  # nobody made the directory yet
        found: list[int] = []
        for name, inode, path in boxes:
            match = NAME.fullmatch(name)
            if match is None or int(match[1]) in known or self._refused.get(name) == inode:
                continue
            if len(known) + len(found) == self.count:
                break
            if self._is_ours(Path(path), int(match[1])):
                found.append(int(match[1]))
            else:
                self._refused[name] = inode
        return found

    def _is_ours(self, path: Path, rank: int) -> bool:
        try:
            with Box(path) as box:
                if box.rank != rank or start_ticks(box.pid) != box.start_ticks:
                    return False
                if self._carrying is None:
                    return bool(box.made_ns >= self._born_ns)
                environ = Path(f"/proc/{box.pid}/environ").read_bytes()
                return self._carrying in environ.split(b"\0")
        except (BlackBoxError, OSError):
            return False
