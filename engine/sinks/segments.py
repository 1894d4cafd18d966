"""MPEG-TS segments and their playlist, for a stream that must survive whatever ends it.

    segments/00000000.ts, 00000001.ts, ...     each plays by itself
    segments/index.m3u8                        HLS: the segments that will not change any more, with their durations

Every file is whole whenever it stands under its name. A segment of several chunks is replaced by a longer one at each
chunk, and listed when it is full. So `kill -9` loses at most the chunk in hand. A sink that finds segments there goes
on after them: what the last one did not list is listed, and the playlist shows the break.
"""

from __future__ import annotations

import errno
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SinkError
from engine.sinks.encoder import add_stream, pick_encoder
from engine.sinks.staged import Staged, disk_error, replace_file

if TYPE_CHECKING:
    import numpy as np

INDEX = "index.m3u8"
SEGMENT = re.compile(r"(\d{8})\.ts")
# Without lookahead and reordering each frame gives its packet at once, so that a chunk is whole when it is encoded.
ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "18", "threads": "1", "tune": "zerolatency", "forced-idr": "1"},
    "mpeg4": {"qscale": "3", "threads": "1"},
}


@dataclass(frozen=True)
class Listed:
    """A segment in the playlist; `breaks`: it does not go on where the one before it ended."""

    number: int
    duration_s: float
    breaks: bool = False


@dataclass
class Playlist:
    """What is listed now, and how many breaks were listed before it."""

    segments: list[Listed] = field(default_factory=list)
    breaks_before: int = 0

    def text(self, least_target_s: float, following: int, ended: bool) -> str:
        longest_s = max((segment.duration_s for segment in self.segments), default=0.0)
        lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:3",
            f"#EXT-X-TARGETDURATION:{max(1, math.ceil(least_target_s), math.ceil(longest_s))}",
            f"#EXT-X-MEDIA-SEQUENCE:{self.segments[0].number if self.segments else following}",
            f"#EXT-X-DISCONTINUITY-SEQUENCE:{self.breaks_before}",
            "#EXT-X-INDEPENDENT-SEGMENTS",
        ]
        for segment in self.segments:
            lines += ["#EXT-X-DISCONTINUITY"] if segment.breaks else []
            lines += [f"#EXTINF:{segment.duration_s:.6f},", _name(segment.number)]
        lines += ["#EXT-X-ENDLIST"] if ended else []
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str, where: Path) -> Playlist:
        """A playlist that this sink wrote.

        Raises:
            SinkError: it is of another kind; nothing of it is overwritten.
        """
        found, lines = cls(), text.splitlines()
        duration_s, breaks = None, False
        for line in lines:
            if number := re.fullmatch(r"#EXT-X-DISCONTINUITY-SEQUENCE:(\d+)", line):
                found.breaks_before = int(number[1])
            elif number := re.fullmatch(r"#EXTINF:(\d+\.\d+),", line):
                duration_s = float(number[1])
            elif line == "#EXT-X-DISCONTINUITY":
                breaks = True
            elif not line.startswith("#"):
                name = SEGMENT.fullmatch(line)
                if name is None or duration_s is None:
                    break
                found.segments.append(Listed(int(name[1]), duration_s, breaks))
                duration_s, breaks = None, False
        else:
            if lines[:1] == ["#EXTM3U"]:
                return found
        raise SinkError(
            f"{where} is a playlist that this sink did not write",
            code="TP-5115",
            where=str(where),
            next_step=f"ls -l {where.parent}",
        )

    def drop_all_but(self, newest: int) -> list[Listed]:
        """Forget the others, and return them."""
        gone = self.segments[:-newest]
        self.segments = self.segments[len(gone) :]
        self.breaks_before += sum(segment.breaks for segment in gone)
        return gone


class SegmentsSink:
    """H.264 in MPEG-TS, cut at chunks.

    Args:
        directory: of the segments; made if need be.
        height, width: pixels, even.
        fps: frames a second.
        segment_s: least length of a segment; 0 makes one for each chunk.
        keep: how many of the newest stay; 0 keeps all.

    Raises:
        SinkError: the directory cannot be written, or holds a playlist of another kind (TP-5115).
    """

    def __init__(
        self, directory: Path, *, height: int, width: int, fps: int, segment_s: float = 0.0, keep: int = 0
    ) -> None:
        self._directory = directory
        self._size = (height, width)
        self._fps = fps
        self._segment_s = segment_s
        self._keep = keep
        self._encoder = pick_encoder()
        self._open: _Segment | None = None
        self._frames = 0
        self._wrote = False
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise disk_error(error, directory) from error
        Staged(directory / INDEX).discard()  # room for a file, found before any chunk is made
        self._playlist = self._found()
        earlier = self._playlist.segments
        self._breaks = bool(earlier)
        self._number = earlier[-1].number + 1 if earlier else 0

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        if self._open is None:
            height, width = self._size
            self._open = _Segment(self._encoder, height=height, width=width, fps=self._fps, first=self._frames)
        segment = self._open
        segment.encode(pixels_THWC)
        self._frames += len(pixels_THWC)
        full = segment.frames >= self._segment_s * self._fps
        replace_file(self._directory / _name(self._number), segment.finish() if full else segment.so_far())
        self._wrote = True
        if full:
            self._list()

    def close(self) -> Path | None:
        if self._open is not None:
            replace_file(self._directory / _name(self._number), self._open.finish())
            self._list()
        if not self._wrote:
            return None
        return self._publish(ended=True)

    def abort(self) -> None:
        """What stands there is whole, and stays."""
        self._open = None

    def _list(self) -> None:
        """The open segment is full: it will not change any more."""
        assert self._open is not None
        self._playlist.segments.append(Listed(self._number, self._open.frames / self._fps, self._breaks))
        self._open, self._breaks = None, False
        self._number += 1
        gone = self._playlist.drop_all_but(self._keep) if self._keep else []
        self._publish()
        for segment in gone:  # after the playlist forgot it
            (self._directory / _name(segment.number)).unlink(missing_ok=True)

    def _publish(self, ended: bool = False) -> Path:
        text = self._playlist.text(self._segment_s, self._number, ended)
        return replace_file(self._directory / INDEX, text.encode())

    def _found(self) -> Playlist:
        """What an earlier sink left here: its playlist, and the segments that it had no time to list."""
        index = self._directory / INDEX
        try:
            found = Playlist.parse(index.read_text(encoding="utf-8"), index) if index.exists() else Playlist()
            names = sorted(path.name for path in self._directory.iterdir() if SEGMENT.fullmatch(path.name))
        except OSError as error:
            raise disk_error(error, index) from error
        last = found.segments[-1].number if found.segments else -1
        for name in names:
            if int(name[:8]) > last:
                found.segments.append(Listed(int(name[:8]), _duration_s(self._directory / name, self._fps)))
        return found


class _Segment:
    """One MPEG-TS stream in memory."""

    def __init__(self, encoder: str, *, height: int, width: int, fps: int, first: int) -> None:
        import av

        self.frames = 0
        self._first = first
        self._raw = io.BytesIO()
        self._container: Any = av.open(
            self._raw, mode="w", format="mpegts", options={"fflags": "+bitexact", "flush_packets": "1"}
        )
        self._stream = add_stream(self._container, encoder, ENCODERS[encoder], height=height, width=width, fps=fps)

    def encode(self, pixels_THWC: np.ndarray) -> None:
        """One chunk, which begins with a key frame."""
        import av
        import numpy as np

        for place, pixels_HWC in enumerate(pixels_THWC):
            frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
            frame.pts = self._first + self.frames
            frame.time_base = self._stream.codec_context.time_base
            if place == 0:
                frame.pict_type = av.video.frame.PictureType.I
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def so_far(self) -> bytes:
        """All frames up to now, as a file that plays."""
        return self._raw.getvalue()

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._raw.getvalue()


def _duration_s(path: Path, fps: int) -> float:
    """Of a segment that nobody listed, by its frames. Raises SinkError for a file that is none."""
    import av

    try:
        with av.open(str(path), format="mpegts") as container:
            frames: int = sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError) as error:
        reason = OSError(errno.EINVAL, f"no MPEG-TS segment ({error})")
        raise disk_error(reason, path) from error
    return frames / fps


def _name(number: int) -> str:
    return f"{number:08d}.ts"
