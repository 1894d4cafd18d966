"""Which H.264 encoder there is, and its stream in a container: the same pixels give the same bytes.

One encoder thread, no dates, no version strings. What the encoder is told besides is each sink's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from engine.errors import SinkError

# mpeg4 stands in where PyAV was built without x264; both are in every player.
NAMES = ("libx264", "mpeg4")


def pick_encoder() -> str:
    """The first of `NAMES` that this PyAV has. Raises SinkError if it has none."""
    import av

    for name in NAMES:
        if name in av.codecs_available:
            return name
    raise SinkError(
        f"this PyAV ({av.__version__}) has none of the encoders {', '.join(NAMES)}",
        code="TP-5104",
        next_step="pip install --force-reinstall av",
    )


def add_stream(container: Any, encoder: str, options: Mapping[str, str], *, height: int, width: int, fps: int) -> Any:
    """A yuv420p stream of `fps` frames a second, whose time base is one frame."""
    import av

    stream: Any = container.add_stream(encoder, rate=fps, options=dict(options))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, fps)
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    return stream
