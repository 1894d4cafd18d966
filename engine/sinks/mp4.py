"""H.264 video through PyAV.

The same pixels give the same bytes: one encoder thread, no lookahead, constant quality, no dates, no version strings.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import SinkError
from engine.sinks.staged import Staged

if TYPE_CHECKING:
    import numpy as np

# mpeg4 stands in where PyAV was built without x264; both are in every player. x264 without lookahead: with it, 400
# runs over the same small frames gave 34 different files and even two different pictures; without, one.
ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "18", "threads": "1", "rc-lookahead": "0"},
    "mpeg4": {"qscale": "3", "threads": "1"},
}


def pick_encoder() -> str:
    """The first of `ENCODERS` that this PyAV has. Raises SinkError if it has none."""
    import av

    for name in ENCODERS:
        if name in av.codecs_available:
            return name
    raise SinkError(
        f"this PyAV ({av.__version__}) has none of the encoders {', '.join(ENCODERS)}",
        code="TP-5104",
        next_step="pip install --force-reinstall av",
    )


class Mp4Sink:
    """yuv420p video at `fps` frames a second.

    Args:
        final: where the video appears on `close`.
        height, width: pixels, even.
        fps: frames a second.
    """

    def __init__(self, final: Path, *, height: int, width: int, fps: int) -> None:
        import av

        encoder = pick_encoder()
        self._frames = 0
        self._staged = Staged(final)
        with self._staged.guard():
            self._container: Any = av.open(self._staged, mode="w", format="mp4", options={"fflags": "+bitexact"})
            stream: Any = self._container.add_stream(encoder, rate=fps, options={**ENCODERS[encoder]})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, fps)
            stream.codec_context.flags |= av.codec.context.Flags.bitexact
            self._stream = stream

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        import av
        import numpy as np

        with self._staged.guard():
            for pixels_HWC in pixels_THWC:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
                frame.pts = self._frames
                frame.time_base = self._stream.codec_context.time_base
                self._container.mux(self._stream.encode(frame))
                self._frames += 1

    def close(self) -> Path | None:
        if not self._staged.open:
            return None
        if not self._frames:
            self.abort()
            return None
        with self._staged.guard():
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._staged.commit()

    def abort(self) -> None:
        """What the encoder still writes after this goes nowhere."""
        self._staged.discard()
