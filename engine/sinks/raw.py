"""Exact frames as safetensors: one uint8 tensor [T, H, W, 3] a chunk, under `chunk_00000`, `chunk_00001`, ...

Streamed: the frames go to the disk as they come. The format puts its index first, so room is reserved for it and
filled in `close`; when the room runs out, the data is moved up in place. Memory and disk never hold a second copy.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.sinks.staged import Staged

if TYPE_CHECKING:
    import numpy as np

ROOM_BYTES = 64 * 1024  # about 500 chunks; doubled when needed
LENGTH_BYTES = 8
BLOCK_BYTES = 1 << 20


class RawSink:
    """Frames of every chunk, and the prompts where they change as metadata `prompt_00000`.

    Args:
        final: where the file appears on `close`.
        fps: kept in the metadata.
        room_bytes: first reserve for the index, a multiple of 8.
    """

    def __init__(self, final: Path, *, fps: int, room_bytes: int = ROOM_BYTES) -> None:
        self._room = room_bytes
        self._size = 0
        self._prompt: str | None = None
        self._index: dict[str, Any] = {"__metadata__": {"fps": str(fps), "layout": "THWC"}}
        self._staged = Staged(final)
        with self._staged.guard():
            self._staged.seek(LENGTH_BYTES + self._room)

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        import numpy as np

        with self._staged.guard():
            self._staged.write(np.ascontiguousarray(pixels_THWC).data)
            self._index[f"chunk_{chunk_index:05d}"] = {
                "dtype": "U8",
                "shape": list(pixels_THWC.shape),
                "data_offsets": [self._size, self._size + pixels_THWC.nbytes],
            }
            self._size += pixels_THWC.nbytes
            if prompt != self._prompt:
                self._index["__metadata__"][f"prompt_{chunk_index:05d}"] = self._prompt = prompt
            while len(self._header()) > self._room:
                self._move_up(self._room)

    def close(self) -> Path | None:
        if not self._staged.open:
            return None
        if not self._size:
            self.abort()
            return None
        with self._staged.guard():
            self._staged.seek(0)
            self._staged.write(struct.pack("<Q", self._room) + self._header().ljust(self._room))
        return self._staged.commit()

    def abort(self) -> None:
        self._staged.discard()

    def _header(self) -> bytes:
        return json.dumps(self._index, separators=(",", ":")).encode()

    def _move_up(self, by: int) -> None:
        """Shift the data by `by` bytes, last block first, so that no block is overwritten before it was moved."""
        start = LENGTH_BYTES + self._room
        end = start + self._size
        while end > start:
            begin = max(start, end - BLOCK_BYTES)
            self._staged.seek(begin)
            block = self._read(end - begin)
            self._staged.seek(begin + by)
            self._staged.write(block)
            end = begin
        self._room += by
        self._staged.seek(LENGTH_BYTES + self._room + self._size)

    def _read(self, length: int) -> bytes:
        parts = []
        while length > 0 and (part := self._staged.read(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
