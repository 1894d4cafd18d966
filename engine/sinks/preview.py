"""A PNG of the newest chunk, its last frame at full size. Whoever opens it finds a whole picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from engine.sinks.staged import Staged, replace_file

if TYPE_CHECKING:
    import numpy as np


class PreviewSink:
    """Replaced at each chunk; its text fields `chunk_index` and `prompt` say what it shows.

    Args:
        final: where the picture stands from the first chunk on.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._made = False
        Staged(final).discard()  # a place that takes no file, or a full disk, is found before any chunk is made

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("chunk_index", str(chunk_index))
        text.add_itxt("prompt", prompt)
        raw = io.BytesIO()
        Image.fromarray(pixels_THWC[-1]).save(raw, format="PNG", pnginfo=text, compress_level=1)
        replace_file(self._final, raw.getvalue())
        self._made = True

    def close(self) -> Path | None:
        return self._final if self._made else None

    def abort(self) -> None:
        """The newest picture is whole, and stays."""
