"""Where finished pixels go: the protocol of a sink, and the set of sinks of one run.

Shapes: T frames, H height, W width, C 3 channels (RGB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import SinkConfig
from engine.errors import SinkError
from engine.sinks.pipe import PipeSink

if TYPE_CHECKING:
    import numpy as np


class Sink(Protocol):
    """One output. A file appears under its final name in `close` and never before."""

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        """Take the frames of one chunk: uint8 [T, H, W, 3], RGB."""

    def close(self) -> Path | None:
        """Finish; returns the file, or None if there is none to show."""

    def abort(self) -> None:
        """Drop everything and leave no file. Harmless when repeated, and after `close`."""


class SinkSet:
    """All sinks of a run, written and ended together. `current` is the one that is being written or finished.

    Args:
        sinks: kind to sink, in the order of the configuration.
        height, width: pixels; every chunk must match.
    """

    def __init__(self, sinks: dict[str, Sink], *, height: int, width: int) -> None:
        self._sinks = sinks
        self._hw = (height, width)
        self._last_chunk: int | None = None
        self._open = True
        self.current: str | None = None

    def write(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        """Give one chunk to every sink. If one of them fails, all are aborted and the error is raised.

        Raises:
            SinkError: wrong frames, chunks out of order, or a disk that refuses.
        """
        try:
            self._check(pixels_THWC, chunk_index)
            for kind, sink in self._sinks.items():
                self.current = kind
                sink.write(pixels_THWC, chunk_index, prompt)
        except BaseException:
            self.abort()
            raise
        self._last_chunk = chunk_index
        self.current = None

    def close(self) -> dict[str, str]:
        """Finish every sink; kind to path of each file made. Calling it again returns nothing.

        Every sink is closed even if one fails: what is whole is kept, and named in the error's evidence.

        Raises:
            SinkError: the first failure.
        """
        if not self._open:
            return {}
        self._open = False
        paths: dict[str, str] = {}
        failure: SinkError | None = None
        for kind, sink in self._sinks.items():
            self.current = kind
            try:
                path = sink.close()
            except SinkError as error:
                failure = failure or error
            else:
                if path is not None:
                    paths[kind] = str(path)
        self.current = None
        if failure is not None:
            failure.evidence["kept"] = paths
            raise failure
        return paths

    def abort(self) -> None:
        """Drop every output that is not closed yet."""
        self._open = False
        for sink in self._sinks.values():
            sink.abort()

    def interrupt(self) -> None:
        """From any thread: a sink that waits for somebody outside waits no longer."""
        for sink in self._sinks.values():
            if isinstance(sink, PipeSink):
                sink.interrupt()

    def facts(self) -> dict[str, Any]:
        """What the sinks say of themselves, by kind."""
        return {kind: sink.facts() for kind, sink in self._sinks.items() if isinstance(sink, PipeSink)}

    def _check(self, pixels_THWC: np.ndarray, chunk_index: int) -> None:
        if not self._open:
            raise SinkError(f"chunk {chunk_index} came after the sinks were closed", code="TP-5105")
        shape = tuple(pixels_THWC.shape)
        if len(shape) != 4 or shape[0] < 1 or shape[1:] != (*self._hw, 3) or str(pixels_THWC.dtype) != "uint8":
            raise SinkError(
                f"chunk {chunk_index} must be uint8 [T, {self._hw[0]}, {self._hw[1]}, 3], "
                f"is {pixels_THWC.dtype} {list(shape)}",
                code="TP-5103",
                evidence={"chunk_index": chunk_index, "shape": shape, "dtype": str(pixels_THWC.dtype)},
            )
        if self._last_chunk is not None and chunk_index <= self._last_chunk:
            raise SinkError(f"chunk {chunk_index} came after chunk {self._last_chunk}", code="TP-5105")


def open_sinks(config: SinkConfig, directory: Path, *, height: int, width: int) -> SinkSet:
    """Open every sink of `config.kinds` in `directory`, or none of them.

    Args:
        config: kinds and frame rate. Its own `directory` is the caller's business.
        directory: an existing directory.
        height, width: pixels, multiples of 16.

    Raises:
        SinkError: the directory is missing, cannot be written or is full; found now, before any chunk is made.
    """
    from engine.sinks.mp4 import Mp4Sink
    from engine.sinks.null import NullSink
    from engine.sinks.preview import PreviewSink
    from engine.sinks.raw import RawSink
    from engine.sinks.segments import SegmentsSink
    from engine.sinks.sheet import SheetSink

    size = {"height": height, "width": width}
    makers: dict[str, Callable[[], Sink]] = {
        "mp4": lambda: Mp4Sink(directory / "video.mp4", **size, fps=config.fps),
        "sheet": lambda: SheetSink(directory / "sheet.png", **size),
        "raw": lambda: RawSink(directory / "frames.safetensors", fps=config.fps),
        "segments": lambda: SegmentsSink(
            directory / "segments", **size, fps=config.fps, segment_s=config.segment_s, keep=config.keep_segments
        ),
        "preview": lambda: PreviewSink(directory / "preview.png"),
        "pipe": lambda: PipeSink(
            directory / "frames.rgb",
            directory / "pipe.json",
            **size,
            fps=config.fps,
            no_reader=config.no_reader,
        ),
        "null": NullSink,
    }
    sinks: dict[str, Sink] = {}
    try:
        for kind in _unique(config.kinds):
            if kind not in makers:
                raise SinkError(f"no sink is called '{kind}'; known: {', '.join(makers)}", code="TP-5104")
            sinks[kind] = makers[kind]()
    except BaseException:
        for sink in sinks.values():
            sink.abort()
        raise
    return SinkSet(sinks, height=height, width=width)


def _unique(kinds: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(kinds))
