"""H.264 video through PyAV.

The same pixels give the same bytes: no lookahead, constant quality, and what `engine.sinks.encoder` sees to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.sinks.encoder import add_stream, pick_encoder
from engine.sinks.staged import Staged

if TYPE_CHECKING:
    import numpy as np

# x264 without lookahead: with it, 400 runs over the same small frames gave 34 different files and even two different
# pictures; without, one.
ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "18", "threads": "1", "rc-lookahead": "0"},
    "mpeg4": {"qscale": "3", "threads": "1"},
}


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
            self._stream = add_stream(self._container, encoder, ENCODERS[encoder], height=height, width=width, fps=fps)

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
