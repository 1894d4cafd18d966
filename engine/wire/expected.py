"""What Stage 0 does with a result: the identifier rules of contract section 5, apart from all transport."""

from __future__ import annotations

from collections import OrderedDict
from enum import StrEnum

from engine.errors import FrameError
from engine.wire.problem import Problem

_REMEMBERED = 1024  # settled ids; a repeat of an older one is as unknown as one that was never sent


class Fate(StrEnum):
    """Of a result: decode it, or drop it because its epoch has passed, or because it came before."""

    ACCEPTED = "accepted"
    STALE = "stale"
    REPEATED = "repeated"


class Expectations:
    """The envelopes that are on their way, in the order they were sent."""

    def __init__(self) -> None:
        self._flying: OrderedDict[int, tuple[int, int]] = OrderedDict()  # call_id: chunk_index, cache_epoch
        self._settled: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._flying)

    def sent(self, call_id: int, chunk_index: int, cache_epoch: int) -> None:
        self._flying[call_id] = (chunk_index, cache_epoch)

    def flies(self, call_id: int) -> bool:
        return call_id in self._flying

    def judge(self, call_id: int, chunk_index: int, cache_epoch: int, now: int) -> Fate:
        """The fate of a result with these ids, while Stage 0 is in epoch `now`. It is settled by this.

        Repeats are told apart before stale ones: a repeat is nobody's share of what was accepted, whatever its epoch.

        Raises:
            FrameError: ahead of what is expected, or an answer to nothing that was asked.
        """
        ids = {"call_id": call_id, "chunk_index": chunk_index, "cache_epoch": cache_epoch}
        if self._settled.get(call_id) == (chunk_index, cache_epoch):
            return Fate.REPEATED
        if self._flying.get(call_id) != (chunk_index, cache_epoch):
            asked = self._flying.get(call_id) or self._settled.get(call_id)
            what = f"call {call_id} asked for chunk {asked[0]} of epoch {asked[1]}" if asked else "nobody asked for it"
            raise _refusal(f"a result for chunk {chunk_index} of epoch {cache_epoch} came, but {what}", ids)
        if cache_epoch >= now:
            expected = next(call for call, (_, epoch) in self._flying.items() if epoch == cache_epoch)
            if call_id != expected:
                chunk = self._flying[expected][0]
                raise _refusal(f"a result for chunk {chunk_index} came ahead of that for chunk {chunk}", ids)
        self._settled[call_id] = self._flying.pop(call_id)
        if len(self._settled) > _REMEMBERED:
            self._settled.popitem(last=False)
        return Fate.STALE if cache_epoch < now else Fate.ACCEPTED


def _refusal(message: str, ids: dict[str, int]) -> FrameError:
    return Problem("call_id", message, "06", "FM-10").refusal(ids)
