"""What breaks a rank, for `start_ranks`: each function plants one thing in its rank."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.comm.group import Group
from engine.comm.neighbours import Neighbours
from engine.errors import CommError, TripwireError
from engine.stage1 import MeshResult, Stage1
from engine.wire.envelope import Envelope


def hear_of_no_end() -> None:
    """The backend never returns from a collective whose peer has gone, as NCCL does not."""
    backend = Group._backend

    @contextmanager
    def deaf(self: Group, op: str) -> Iterator[None]:
        try:
            with backend(self, op):
                yield
        except CommError:
            threading.Event().wait()

    Group._backend = deaf  # type: ignore[method-assign]


def fail_in_phase_b() -> None:
    """This rank finds a fault of its own in chunk 2."""

    def fail(self: Stage1, envelope: Envelope, call_id: int) -> MeshResult:
        if envelope.plan.chunk_index == 2:
            raise TripwireError("planted")
        return step(self, envelope, call_id)

    step, Stage1.step = Stage1.step, fail  # type: ignore[method-assign]


def know_no_neighbours() -> None:
    """The same, and the rank does not know which processes its peers are."""
    hear_of_no_end()
    Neighbours.read = classmethod(lambda cls, rank, words: cls())  # type: ignore[method-assign,assignment]
