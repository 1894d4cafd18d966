"""Raw frames through a named pipe, for a player or an encoder that reads them as they come.

    frames.rgb     the pipe, mode 0600: RGB, 8 bits, row by row, frame after frame
    pipe.json      what a reader must know: size, rate, pixel format, and a command that plays it

The reader may come late, go away and come again: it begins with the first frame of a chunk. Frames for which there is
no reader go nowhere, wait for one, or end the job, as `no_reader` says. One reader at a time: two would share the
bytes, and one that comes before its forerunner's end was noticed begins in the middle of a frame.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shlex
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SinkError
from engine.sinks.staged import Staged, disk_error, replace_file

if TYPE_CHECKING:
    import numpy as np

LOOK_S = 0.05  # how often to look for a reader, and whether to stop: a pipe has no event for either


class PipeSink:
    """The writing end. Python ignores SIGPIPE, so a reader that goes away is an error of `write`, and handled there.

    Args:
        path: of the pipe; one of ours that is there already is used again, with whoever waits at it.
        sidecar: of its description.
        height, width: pixels.
        fps: frames a second, for the description.
        no_reader: `discard`, `wait` or `fail`.

    Raises:
        SinkError: the pipe cannot be made, or something else stands at its path (TP-5116).
    """

    def __init__(self, path: Path, sidecar: Path, *, height: int, width: int, fps: int, no_reader: str) -> None:
        self.path = path
        self._sidecar = sidecar
        self._no_reader = no_reader
        self._fd = -1
        self._had_reader = False
        self._stop = threading.Event()
        self.chunks_unread = 0  # without a reader at their begin, or not to their end
        _make_pipe(path)
        try:
            replace_file(sidecar, json.dumps(_description(path, height, width, fps), indent=1).encode() + b"\n")
        except SinkError:
            path.unlink()
            raise

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        import numpy as np

        if self._fd < 0 and not self._find_reader(chunk_index):
            self.chunks_unread += 1
            return
        left = np.ascontiguousarray(pixels_THWC).data.cast("B")
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            while left and not self._stop.is_set():
                if poll.poll(LOOK_S * 1e3):
                    try:
                        left = left[os.write(self._fd, left) :]
                    except BlockingIOError:
                        continue  # room for less than one page
        except BrokenPipeError:
            self.chunks_unread += 1
            self._lose_reader(chunk_index)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def interrupt(self) -> None:
        """From any thread: nothing waits for a reader any more."""
        self._stop.set()

    def close(self) -> None:
        """A reader sees the end of the stream."""
        self.abort()

    def abort(self) -> None:
        self._hang_up()
        self.path.unlink(missing_ok=True)
        self._sidecar.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any]:
        return {"chunks_unread": self.chunks_unread}

    def _find_reader(self, chunk_index: int) -> bool:
        """Open the pipe, if somebody reads it, or once somebody does; else as `no_reader` says."""
        while True:
            try:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise disk_error(error, self.path) from error
            else:
                self._had_reader = True
                return True
            if self._no_reader == "fail":
                raise self._unread(chunk_index, "has no reader")
            if self._no_reader == "discard" or self._stop.wait(LOOK_S):
                return False

    def _lose_reader(self, chunk_index: int) -> None:
        """What the pipe still holds goes with this end of it: the next reader begins with a frame."""
        self._hang_up()
        if self._no_reader == "fail":
            raise self._unread(chunk_index, "lost its reader")

    def _unread(self, chunk_index: int, what: str) -> SinkError:
        return SinkError(
            f"{self.path} {what} at chunk {chunk_index}, and sink.no_reader is 'fail'",
            code="TP-5117",
            where=str(self.path),
            evidence={"chunk_index": chunk_index, "had_reader": self._had_reader},
            next_step="tpctl up --set sink.no_reader=discard",
        )

    def _hang_up(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make_pipe(path: Path) -> None:
    Staged(path.with_suffix(".probe"), probe=False).discard()  # says what is wrong with the directory, if anything is
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        seen = path.lstat()
        if not stat.S_ISFIFO(seen.st_mode) or seen.st_uid != os.geteuid():
            raise SinkError(
                f"{path} is in the way: it is no pipe of this user",
                code="TP-5116",
                where=str(path),
                next_step=f"ls -l {path}",
            ) from None
        path.chmod(0o600)
    except OSError as error:
        raise disk_error(error, path) from error


def _description(path: Path, height: int, width: int, fps: int) -> dict[str, Any]:
    format_ = f"-f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate {fps}"
    return {
        "schema": "tpctl.pipe",
        "schema_version": 1,
        "pipe": str(path.absolute()),
        "pixel_format": "rgb24",
        "width": width,
        "height": height,
        "fps": fps,
        "frame_bytes": height * width * 3,
        "play": f"ffplay {format_} {shlex.quote(str(path.absolute()))}",
    }
