"""Reading a file that may be anything: gone, growing, a link, a pipe, somebody else's, larger than a bundle."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Read:
    """What was read. `raw` is None with a reason in `why`; `gone` where there is no such file at all."""

    raw: bytes | None
    size: int = 0
    modified_at: float | None = None
    gone: bool = False
    why: str | None = None

    @property
    def cut(self) -> bool:
        return self.raw is not None and len(self.raw) < self.size


def read_bounded(path: Path, limit_bytes: int, keep_head: bool = False) -> Read:
    """A plain file, its end where it is larger than `limit_bytes`: whole lines, and with `keep_head` the first too."""
    try:
        # No link is followed, and a pipe that nobody writes to keeps nobody waiting.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return Read(None, gone=True, why="there is no such file")
    except OSError as error:
        return Read(None, why=f"cannot be opened: {'a link' if path.is_symlink() else error.strerror}")
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            return Read(None, why="is not a plain file")
        size = state.st_size
        if size <= limit_bytes:
            return Read(_pread(fd, size, 0), size, state.st_mtime)
        head = b""
        if keep_head:
            head = _pread(fd, min(limit_bytes // 2, CHUNK_BYTES), 0)
            head = head[: head.find(b"\n") + 1]
        tail = _pread(fd, limit_bytes - len(head), size - limit_bytes + len(head))
        return Read(head + tail[tail.find(b"\n") + 1 :], size, state.st_mtime)
    except OSError as error:
        return Read(None, why=f"cannot be read: {error.strerror}")
    finally:
        os.close(fd)


def _pread(fd: int, size: int, offset: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(fd, min(size, CHUNK_BYTES), offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)
