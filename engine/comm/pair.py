"""`pp_pg`: two ranks that pass messages to each other, each direction ordered by itself.

A message is a tensor whose size both ends know. Each direction has a ledger and a place in the black box of its own,
since nothing orders the two against each other. The backend holds a message back until the other end has posted room
for it, so an end that waits in one direction alone can wait for ever: rank 0 therefore posts, and waits for nothing
but the arrival of what it posted.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.comm.group import PP_LABELS, Group, PhaseGate, Rank
from engine.errors import CommError

if TYPE_CHECKING:
    import torch

# How long a wait takes is the business of the watchdogs, which say why. (A time-out here would break the connection.)
_FOR_EVER = datetime.timedelta(days=3650)
OP = "message"


class Posted:
    """A message under way. Its tensor belongs to the backend until `wait` returns; `number` is that of its record in
    the black box."""

    def __init__(self, channel: Channel, work: Any, tensor: torch.Tensor, number: int) -> None:
        self.tensor = tensor
        self.number = number
        self._channel = channel
        self._work = work

    def wait(self) -> None:
        """Until the message is through. Only waits, so any thread may do it.

        Raises:
            CommError: the peer is gone.
        """
        try:
            self._work.wait(_FOR_EVER)
        except RuntimeError as error:
            raise self._channel.failure(error) from error


class Channel(Group):
    """One direction: `members` are the sender and the receiver."""

    @property
    def sends(self) -> bool:
        return self.rank == self.members[0]

    def post(self, tensor: torch.Tensor) -> Posted:
        """Hand a message, or the room for one, to the backend, and go on.

        The black box counts it as entered, but never shows this rank inside it: it waits for nobody.
        """
        number = self._enter(OP, tensor, inside=False)
        with self._backend(OP):
            work = self._start(tensor)
        return Posted(self, work, tensor, number)

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send or receive, whichever end this is, and wait until it is done; returns the same tensor.

        Raises:
            CommError: the peer is gone.
        """
        self._enter(OP, tensor)
        with self._backend(OP):
            self._start(tensor).wait(_FOR_EVER)
        return tensor

    def exchange_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """Several, one behind the other: each is on its way before the next is made, and all are done on return.

        Raises:
            CommError: the peer is gone.
        """
        with self._backend(OP):
            under_way = []
            for tensor in tensors:
                number = self._enter(OP, tensor)
                under_way.append(Posted(self, self._start(tensor), tensor, number))
            for message in under_way:
                message.wait()

    def failure(self, error: RuntimeError) -> CommError:
        return self._failure(OP, error)

    def _start(self, tensor: torch.Tensor) -> Any:
        sender, receiver = (sorted(self.members).index(member) for member in self.members)
        return self._pg.send([tensor], receiver, 0) if self.sends else self._pg.recv([tensor], sender, 0)


@dataclass(frozen=True)
class Pair:
    """Both directions: `down` from Stage 0 to the mesh leader, `up` back."""

    down: Channel
    up: Channel

    @classmethod
    def of(cls, members: tuple[Rank, ...], rank: Rank, pg: Any, gate: PhaseGate) -> Pair:
        stage0, leader = members
        down, up = PP_LABELS
        return cls(
            Channel("pp_pg", (stage0, leader), rank, pg, gate, down),
            Channel("pp_pg", (leader, stage0), rank, pg, gate, up),
        )
