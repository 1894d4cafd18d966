"""Frames of a video file, in the size of the stream: the input of video-to-video.

T pixel frames, H, W, C 3 channels (RGB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import SourceError

if TYPE_CHECKING:
    from av import VideoFrame

BLOCK_BYTES = 1 << 20


class VideoSource:
    """The frames of the first video stream, one by one, whatever its rate; each is scaled until it covers the size,
    and cut in the middle. Sizes may change within the file.

    Args:
        path: of any file that FFmpeg reads.
        height, width: of the frames to give.
        on_end: `stop`, `loop` or `hold`.

    Raises:
        SourceError: the file is missing, is no video, has no video stream or not one whole frame. Exit code 77.
    """

    def __init__(self, path: Path, *, height: int, width: int, on_end: str) -> None:
        self.path = path
        self._size = (height, width)
        self._on_end = on_end
        self._given = 0
        self.rate: float | None = None  # frames a second, as the file says
        self._last_HWC: np.ndarray[Any, Any] | None = None
        self._ahead: np.ndarray[Any, Any] | None = None
        self._broken: SourceError | None = None
        self._frames = self._decode()
        self._look_ahead()
        if self._ahead is None:
            error = self._broken or SourceError(f"{path} has not one frame", code="TP-5155", where=str(path))
            error.exit_code = 77
            raise error

    @property
    def ended(self) -> bool:
        """Under `stop`: no frame is left. A file that breaks here has not ended: the next `take` says so."""
        return self._ahead is None and self._broken is None and self._on_end == "stop"

    def take(self, count: int) -> np.ndarray[Any, Any]:
        """The next `count` frames, uint8 [T, H, W, 3]. After the last one comes it again, or under `loop` the first.

        Raises:
            SourceError: the file is damaged here, or ends in the middle of a frame.
        """
        return np.stack([self._next() for _ in range(count)])

    def digest(self) -> str:
        """sha256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _look_ahead(self) -> None:
        try:
            self._ahead = next(self._frames, None)
        except SourceError as error:
            self._ahead, self._broken = None, error

    def _next(self) -> np.ndarray[Any, Any]:
        if self._ahead is None and self._broken is None and self._on_end == "loop":
            self._frames = self._decode()
            self._look_ahead()
        if self._broken is not None:
            raise self._broken
        if self._ahead is not None:
            self._last_HWC = self._ahead
            self._given += 1
            self._look_ahead()
        assert self._last_HWC is not None  # the first frame was seen before any was asked for
        return self._last_HWC

    def _decode(self) -> Iterator[np.ndarray[Any, Any]]:
        """All frames from the beginning, by one thread: every rank must see the same ones.

        The decoder is told to give up where it would conceal. A damage that it can decode nobody can tell from a film:
        there is no checksum in it.
        """
        import av

        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise SourceError(f"{self.path} has no video stream", code="TP-5154", where=str(self.path))
                stream = container.streams.video[0]
                self.rate = float(stream.average_rate) if stream.average_rate else None
                stream.thread_count = 1
                stream.codec_context.options = {"err_detect": "explode"}
                first_s = last_s = None
                for packet in container.demux(stream):
                    for frame in packet.decode():
                        if frame.is_corrupt or packet.is_corrupt:
                            raise self._damaged("a frame is corrupt")
                        if frame.time is not None:
                            first_s, last_s = frame.time if first_s is None else first_s, frame.time
                        yield self._fit(frame)
                missing_s = _missing_s(container, stream, first_s, last_s)
                if missing_s > 0:
                    raise self._damaged(f"it ends {missing_s:.2f} s before it should")
        except av.error.FileNotFoundError as error:
            raise SourceError(f"there is no file {self.path}", code="TP-5152", where=str(self.path)) from error
        except av.FFmpegError as error:
            raise self._damaged(error.strerror or str(error)) from error

    def _damaged(self, reason: str) -> SourceError:
        where = f"after frame {self._given}" if self._given else "before its first frame"
        return SourceError(
            f"{self.path} cannot be read {where}: {reason}",
            code="TP-5153",
            where=str(self.path),
            evidence={"frames_read": self._given, "reason": reason},
            next_step=f"ffprobe -v error -count_frames {self.path}",
        )

    def _fit(self, frame: VideoFrame) -> np.ndarray[Any, Any]:
        height, width = self._size
        scale = max(height / frame.height, width / frame.width)
        tall, wide = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
        pixels_HWC = frame.reformat(width=wide, height=tall, format="rgb24", interpolation="BICUBIC").to_ndarray()
        top, left = (tall - height) // 2, (wide - width) // 2
        return np.ascontiguousarray(pixels_HWC[top : top + height, left : left + width])


def _missing_s(container: Any, stream: Any, first_s: float | None, last_s: float | None) -> float:
    """What a file lacks of the length it states, in seconds; 0 where it states none, or has about that much.

    A file that was cut short in mid-copy often just ends. Only of a file with more streams is the length not the
    video's own: sound may go on for a while.
    """
    own = stream.duration * stream.time_base if stream.duration else None
    alone = len(container.streams) == 1 and container.duration
    stated_s = float(own) if own else container.duration / 1e6 if container.duration else None
    if stated_s is None or first_s is None or last_s is None:
        return 0.0
    frame_s = float(1 / stream.average_rate) if stream.average_rate else 0.0
    missing_s = stated_s - (last_s - first_s + frame_s)
    return missing_s if missing_s > (2.5 * frame_s if own or alone else 2.0) else 0.0
