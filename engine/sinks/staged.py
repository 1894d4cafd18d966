"""A file that takes its name only when it is whole: written beside it, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from engine.errors import SinkError

PROBE_BYTES = 64 * 1024  # what the first header and index of any format fits in
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_error(error: OSError, path: Path) -> SinkError:
    """The operating system's refusal as a SinkError that names `path`, the reason and the way out."""
    reason = error.strerror or str(error)
    evidence = {"path": str(path), "errno": errno.errorcode.get(error.errno or 0, str(error.errno)), "reason": reason}
    if error.errno in FULL:
        return SinkError(
            f"no room to write {path}: {reason}",
            code="TP-5102",
            where=str(path),
            evidence=evidence,
            next_step=f"df -h {path.parent}",
        )
    next_step = f"mkdir -p {path.parent}" if error.errno == errno.ENOENT else f"ls -ld {path.parent}"
    return SinkError(
        f"cannot write {path}: {reason}", code="TP-5101", where=str(path), evidence=evidence, next_step=next_step
    )


class Staged:
    """A writable file for libraries that want `write`, `seek` and `tell`.

    Unbuffered on purpose: a full disk shows in the call that filled it, and nothing is left to flush afterwards.
    The first OSError is kept, because a library that calls back into `write` may lose it on its way out.

    Args:
        final: the name that the file gets in `commit`. Its directory must exist.
        probe: find out now whether there is room for a header.

    Raises:
        SinkError: the directory cannot be written, has no room for a header, or a directory stands at `final`.
    """

    def __init__(self, final: Path, *, probe: bool = True) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
        self._error: OSError | None = None
        self._fd = -1
        if final.is_dir():
            raise disk_error(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)), final)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            if probe:
                self.write(bytes(PROBE_BYTES))
                os.fsync(self._fd)
                os.ftruncate(self._fd, 0)
                self.seek(0)
        except OSError as error:
            self.discard()
            raise disk_error(error, final) from error

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; returns its length. After `discard` it writes nothing and says it did."""
        view = memoryview(data).cast("B")
        if self.open:
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError as error:
                self._error = self._error or error
                raise
        return memoryview(data).nbytes

    def read(self, length: int) -> bytes:
        return os.read(self._fd, length) if self.open else b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._fd, offset, whence) if self.open else 0

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn a disk error of the body into a SinkError, even one that a library swallowed; discards the file."""
        try:
            yield
            if self._error is not None:
                raise self._error
        except OSError as error:
            cause = self._error or error
            self.discard()
            raise disk_error(cause, self.final) from error
        except BaseException:
            self.discard()
            raise

    def commit(self) -> Path:
        """Sync and rename to `final`. Raises SinkError, and leaves nothing, if the disk refuses."""
        with self.guard():
            os.fsync(self._fd)
            os.replace(self.path, self.final)
            os.close(self._fd)
            self._fd = -1
        return self.final

    def discard(self) -> None:
        """Remove the temporary file. Harmless when repeated, and after `commit`."""
        if self.open:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):  # the directory may be gone; the file then is too
                self.path.unlink()


def replace_file(final: Path, data: bytes) -> Path:
    """`data` under the name `final`, in one step for whoever reads it. Raises SinkError, and leaves what was there."""
    staged = Staged(final, probe=False)
    with staged.guard():
        staged.write(data)
    return staged.commit()
