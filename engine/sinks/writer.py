"""The thread that writes finished chunks, and the bounded queue before it: a slow sink is a policy, never memory.

    phase C   put(chunk) -> queue of `queue_chunks` -> writer thread -> every sink

A chunk is emitted when every sink has it. One that finds the queue full waits (`block`), makes room by dropping the
oldest that waits (`drop-oldest`), or is the last: the job drains and ends with the reason (`fail`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import SinkConfig
from engine.errors import EngineError, SinkError
from engine.sinks.base import SinkSet

if TYPE_CHECKING:
    import numpy as np

STUCK_S = 1.0  # a wait for a sink that is told
JOIN_S = 5.0  # for a sink to notice that it is to end
FLUSH_S = 0.2  # peers wait to be told, so not longer


@dataclass(frozen=True)
class Waiting:
    """A finished chunk: uint8 pixels [T, H, W, 3]."""

    pixels_THWC: np.ndarray
    chunk_index: int
    prompt: str


class SinkWriter:
    """Owns a set of sinks: after `start` its thread alone touches them.

    Args:
        sinks: opened by this thread's maker.
        config: the policy and the bound.
        written: called with each chunk that every sink has.
        dropped: called with each chunk that made room for a later one.
        failed: called once, when a sink is too slow under `fail`: no more chunks should come.
        stuck: called, in the thread that waits, with the sink that it has waited for longer than `STUCK_S`.
    """

    def __init__(
        self,
        sinks: SinkSet,
        config: SinkConfig,
        *,
        written: Callable[[int], None],
        dropped: Callable[[int], None],
        failed: Callable[[SinkError], None],
        stuck: Callable[[str], None] = lambda sink: None,
    ) -> None:
        self._sinks = sinks
        self._config = config
        self._written = written
        self._dropped = dropped
        self._failed = failed
        self._stuck = stuck
        self._changed = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self._now: tuple[int, float] | None = None  # the chunk that is being written, and since when
        self._closing = False
        self._aborting = self._done = False
        self._lost: list[int] = []
        self._outputs: dict[str, str] = {}
        self._failure: BaseException | None = None
        self._most = 0
        self._waited_s = self._told_s = 0.0
        self._overrun = False
        self._thread = threading.Thread(target=self._run, name="sinks", daemon=True)
        self._thread.start()

    def put(self, pixels_THWC: np.ndarray, chunk_index: int, prompt: str) -> None:
        """Hand one finished chunk over. Waits for room under `block`, and under `fail` once it has failed.

        Raises:
            SinkError: what ended the writer.
        """
        with self._changed:
            self._raise_failure()
            if self._full() and self._config.on_slow == "drop-oldest":
                self._dropped(self._queue.popleft().chunk_index)
            elif self._full():
                if self._config.on_slow == "fail" and not self._overrun:
                    self._overrun = True
                    self._failed(self._too_slow(chunk_index))
                self._wait(lambda: not self._full())
                self._raise_failure()
            self._queue.append(Waiting(pixels_THWC, chunk_index, prompt))
            self._most = max(self._most, len(self._queue))
            self._changed.notify_all()

    def close(self) -> dict[str, str]:
        """Write what waits, finish every sink; kind to path of each file made.

        Raises:
            SinkError: the first failure.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._wait(lambda: self._done)
        self._raise_failure()
        return self._outputs

    def freeze(self) -> list[int]:
        """From any thread: nothing is told from now on. Returns the chunks that were handed over and are not out."""
        held = self._changed.acquire(timeout=STUCK_S)  # held for moments only; a rank that leaves must not wait for it
        if not self._aborting:
            self._aborting = True
            now = [self._now[0]] if self._now is not None and self._now[0] >= 0 else []
            self._lost = [*now, *(chunk.chunk_index for chunk in self._queue)]
            self._queue.clear()
        if held:
            self._changed.notify_all()
            self._changed.release()
        return self._lost

    def abort(self) -> None:
        """Leave no file that is not whole. What was handed over may still be written, for a moment; then it is lost,
        and so is a sink that hangs."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._aborting or self._failure is not None or not (self._queue or self._now), FLUSH_S
            )
        self.freeze()
        self._sinks.interrupt()
        self._thread.join(JOIN_S)

    def blocker(self, least_s: float = 0.0) -> str | None:
        """Which sink has held up what for `least_s` seconds or longer, in words; None where none has."""
        now, sink = self._now, self._sinks.current
        if now is None or time.monotonic() - now[1] < least_s:
            return None
        chunk, since_s = now
        what = f"writing chunk {chunk}" if chunk >= 0 else "finishing"
        return f"sink {sink}: {what} for {time.monotonic() - since_s:.1f} s, {len(self._queue)} more chunk(s) wait"

    def facts(self) -> dict[str, Any]:
        """For the rank's report."""
        return {
            "on_slow": self._config.on_slow,
            "queue_chunks": self._config.queue_chunks,
            "most_queued": self._most,
            "waited_s": round(self._waited_s, 3),
            **self._sinks.facts(),
        }

    def waited_ms(self) -> float:
        """How long the stream waited for the sinks since this was last asked."""
        told_s, self._told_s = self._told_s, self._waited_s
        return (self._told_s - told_s) * 1e3

    def _full(self) -> bool:
        return len(self._queue) >= self._config.queue_chunks

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds or the writer failed; a wait that lasts is told, once for each sink that it lasts for."""
        began_s, told = time.monotonic(), None
        while not condition() and self._failure is None:
            self._changed.wait(STUCK_S)
            now, sink = self._now, self._sinks.current
            if now is not None and sink not in (None, told) and time.monotonic() - now[1] >= STUCK_S:
                told = sink
                self._stuck(str(sink))
        self._waited_s += time.monotonic() - began_s

    def _too_slow(self, chunk_index: int) -> SinkError:
        return SinkError(
            f"the sinks are slower than the stream: {len(self._queue)} chunk(s) wait already; {self.blocker()}",
            code="TP-5110",
            evidence={"chunk_index": chunk_index, "queue_chunks": self._config.queue_chunks, "sink": self.blocker()},
            next_step="tpctl up --on-slow-sink drop-oldest",
        )

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if isinstance(self._failure, EngineError):
            raise self._failure
        raise SinkError(f"a sink failed: {self._failure!r}", code="TP-5111") from self._failure

    # The writer thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                self._sinks.write(chunk.pixels_THWC, chunk.chunk_index, chunk.prompt)
                with self._changed:
                    if not self._aborting:
                        self._now = None
                        self._written(chunk.chunk_index)
                        self._changed.notify_all()
            if not self._aborting:
                self._now = (-1, time.monotonic())
                self._outputs = self._sinks.close()
        except BaseException as error:  # noqa: BLE001 - latched here, raised by the next call from outside
            self._failure = error
            self.freeze()
        if self._aborting:
            self._sinks.abort()
        with self._changed:
            self._now = None
            self._done = True
            self._changed.notify_all()

    def _next(self) -> Waiting | None:
        """The chunk to write now; None when there will be none."""
        with self._changed:
            self._now = None
            self._changed.wait_for(lambda: self._queue or self._closing or self._aborting)
            if not self._queue or self._aborting:
                return None
            chunk = self._queue.popleft()
            self._now = (chunk.chunk_index, time.monotonic())
            self._changed.notify_all()
            return chunk
