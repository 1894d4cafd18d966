"""Memory that was asked for in vain, told as what it is: which rank, where, how much, and what it held then.

An allocator raises whatever its library raises: MemoryError, numpy's own, torch's OutOfMemoryError on a device and a
plain RuntimeError on the host. None of them names a rank or a chunk.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import EngineError, ShortageError
from engine.report import rss_bytes

WORDS = re.compile(r"(can't|cannot|unable to) allocate|out of memory", re.IGNORECASE)
ASKED = re.compile(r"(?:to allocate|allocate) ([\d.]+) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE)
HERE = Path(__file__).parent
Run = TypeVar("Run", bound=Callable[[Any], None])


def named(error: BaseException, rank: int, ids: Mapping[str, int]) -> BaseException:
    """The shortage that this error is; any other error as it is. `ids` are of the frame in work, if there is one."""
    text = str(error)
    short = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and WORDS.search(text) is not None)
    if not short or isinstance(error, EngineError):
        return error
    asked = ASKED.search(text)
    ids = {key: value for key, value in ids.items() if value >= 0}
    when = f"in chunk {ids['chunk_index']}" if "chunk_index" in ids else "before its first chunk"
    return ShortageError(
        f"rank {rank} asked for {f'{asked[1]} {asked[2]}' if asked else 'memory'} in vain, {when}, "
        f"at {_place(error)}; it held {rss_bytes() >> 20} MiB",
        where=_place(error),
        ids=ids,
    )


def names_shortage(run: Run) -> Run:
    """Of a rank's run: what it raises is `named`. Its object has the rank's context."""

    @functools.wraps(run)
    def told(self: Any) -> None:
        try:
            run(self)
        except (MemoryError, RuntimeError) as error:
            shortage = self.context.named(error)
            if shortage is error:
                raise
            raise shortage from error

    return told  # type: ignore[return-value]


def _place(error: BaseException) -> str:
    """The innermost line of the engine's own that was being run."""
    place, trace = "an unknown place", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(HERE):
            place = f"{file.relative_to(HERE.parent)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
