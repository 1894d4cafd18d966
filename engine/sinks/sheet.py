"""A contact sheet: one row a chunk, its first, middle and last frame, and a caption.

However long the run, the sheet stays small: past `MAX_ROWS` every other row is dropped and only every second, then
every fourth chunk is kept. The first chunk always stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.sinks.staged import Staged

if TYPE_CHECKING:
    import numpy as np

MAX_ROWS = 64
MAX_THUMB_WIDTH = 240  # pixels
MIN_THUMB_WIDTH = 120  # a caption needs some width even over tiny frames
COLUMNS = 3
GAP = 4
CAPTION = 18
FONT_SIZE = 12
PAPER = (24, 24, 26)
INK = (235, 235, 235)


class SheetSink:
    """PNG of `COLUMNS` thumbnails a row; frames keep their aspect.

    Args:
        final: where the sheet appears on `close`.
        height, width: pixels of a frame.
    """

    def __init__(self, final: Path, *, height: int, width: int) -> None:
        thumb_width = min(max(width, MIN_THUMB_WIDTH), MAX_THUMB_WIDTH)
        self._thumb = (thumb_width, max(1, round(height * thumb_width / width)))
        self._rows: list[tuple[int, str, list[Any]]] = []
        self._stride = 1
        self._seen = 0
        self._staged = Staged(final)

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        from PIL import Image

        if self._seen % self._stride == 0:
            last = len(pixels_THWC) - 1
            picks = (0, last // 2, last)
            thumbs = [Image.fromarray(pixels_THWC[i]).resize(self._thumb, Image.Resampling.BICUBIC) for i in picks]
            self._rows.append((chunk_index, prompt, thumbs))
            if len(self._rows) > MAX_ROWS:
                self._rows = self._rows[::2]
                self._stride *= 2
        self._seen += 1

    def close(self) -> Path | None:
        if not self._staged.open:
            return None
        if not self._rows:
            self.abort()
            return None
        with self._staged.guard():
            self._draw().save(self._staged, format="PNG")
        return self._staged.commit()

    def abort(self) -> None:
        self._rows = []
        self._staged.discard()

    def _draw(self) -> Any:
        from PIL import Image, ImageDraw, ImageFont

        width, height = self._thumb
        row_height = CAPTION + height + GAP
        sheet = Image.new("RGB", (GAP + COLUMNS * (width + GAP), GAP + len(self._rows) * row_height), PAPER)
        pen = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(FONT_SIZE)
        for row, (chunk_index, prompt, thumbs) in enumerate(self._rows):
            top = GAP + row * row_height
            pen.text(
                (GAP, top), _fit(f"{chunk_index}  {_one_line(prompt)}", pen, font, sheet.width - 2 * GAP), INK, font
            )
            for column, thumb in enumerate(thumbs):
                sheet.paste(thumb, (GAP + column * (width + GAP), top + CAPTION))
        return sheet


def _one_line(prompt: str) -> str:
    return " ".join(prompt.split())


def _fit(text: str, pen: Any, font: Any, width: int) -> str:
    """The longest start of `text` that is at most `width` pixels wide, with dots if it was cut."""
    if pen.textlength(text, font) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if pen.textlength(text[:middle].rstrip() + "...", font) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."
