"""The sink that keeps nothing and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class NullSink:
    """For measuring: `frames` and `chunks` say what came by."""

    def __init__(self) -> None:
        self.frames = 0
        self.chunks = 0

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        self.frames += len(pixels_THWC)
        self.chunks += 1

    def close(self) -> None:
        """Nothing to finish."""

    def abort(self) -> None:
        """Nothing to drop."""
