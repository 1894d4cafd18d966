"""A process group that knows its members, its phases and its history.

Every collective of the engine goes through `Group`. Before the backend is entered it refuses a caller that is no
member and a phase that does not allow the group; after that it folds (group, op, shape, dtype) into a running hash,
the *ledger*, so that ranks can prove they made the same calls in the same order, and records the call in the rank's
black box, where the referee compares it with its peers' while the job runs.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NewType

from engine.blackbox import BlackBox, pack_signature, pack_site
from engine.errors import CommError, GroupError

if TYPE_CHECKING:
    import torch

Rank = NewType("Rank", int)  # global
GroupRank = NewType("GroupRank", int)  # within one group; for the mesh this is `mesh_rank`


class Phase(StrEnum):
    """Where a rank is. Phase B allows `mesh_pg` alone; the handshake alone may use `world_pg`."""

    HANDSHAKE = "handshake"
    LINK = "link"
    B = "B"


PP_LABELS = ("pp_pg.down", "pp_pg.up")  # its two directions
ALLOWED: dict[Phase, frozenset[str]] = {
    Phase.HANDSHAKE: frozenset({"world_pg", *PP_LABELS, "mesh_pg"}),
    Phase.LINK: frozenset({*PP_LABELS, "mesh_pg"}),
    Phase.B: frozenset({"mesh_pg"}),
}


class PhaseGate:
    """The current phase of this rank, and the ids of the frame in work. One per rank, shared by its groups.

    With a black box, the groups that share the gate record what they do in it.
    """

    def __init__(
        self, phase: Phase = Phase.HANDSHAKE, ids: dict[str, int] | None = None, blackbox: BlackBox | None = None
    ) -> None:
        self.ids = ids if ids is not None else {}
        self.blackbox = blackbox
        self.poisoned = False
        self._owner: int | None = None
        self.phase = phase

    @contextmanager
    def owned(self) -> Iterator[None]:
        """While the body runs, this thread alone may use the groups that share the gate (contract, section 3)."""
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            if not self.poisoned:
                self._owner = None

    def refusal(self) -> str | None:
        """Why the calling thread may use no group now, or None."""
        if self.poisoned:
            return "the comms thread did not end, and nobody touches the groups again"
        if self._owner is not None and self._owner != threading.get_ident():
            return "the comms thread owns the groups"
        return None

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        if self.blackbox is not None:
            self.blackbox.enter_phase(phase.value)


@dataclass(frozen=True)
class Call:
    """What identifies a collective: its words for the ledger, and its packed part of a black box record."""

    text: bytes
    signature: bytes

    @classmethod
    def of(cls, group: str, members: tuple[Rank, ...], op: str, tensor: torch.Tensor) -> Call:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype)
        text = f"{group}|{op}|{shape}|{dtype};".encode()
        # The ledger is compared within a group. Between groups of one name, the members tell apart.
        identity = hashlib.blake2b(text + repr(tuple(map(int, members))).encode(), digest_size=8).digest()
        what = f"{dtype.removeprefix('torch.')}{list(shape)}".replace(" ", "")
        return cls(text, pack_signature(int.from_bytes(identity, "little"), group, op, what))


class Ledger:
    """Running hash over (group, op, shape, dtype) of each collective, with a count."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, call: Call) -> None:
        self.count += 1
        self._hash.update(call.text)

    def value(self) -> int:
        """The hash as a signed 64-bit integer."""
        return int(struct.unpack("<q", self._hash.digest())[0])


class Group:
    """One process group seen from one rank.

    Args:
        name: `world_pg`, `pp_pg` or `mesh_pg`.
        members: global ranks in group order; `members[0]` is the leader.
        rank: this process' global rank.
        pg: the torch process group, or None for a group of one, whose collectives are the identity.
        gate: the rank's phase.
        label: the name in the ledger and the black box; a group whose two directions are ordered apart has two.
    """

    def __init__(
        self, name: str, members: tuple[Rank, ...], rank: Rank, pg: Any, gate: PhaseGate | None = None, label: str = ""
    ) -> None:
        self.name = name
        self.label = label or name
        self.members = members
        self.rank = rank
        self.gate = gate if gate is not None else PhaseGate()
        self.ledger = Ledger()
        self.waited_ns = 0  # inside the backend: a rank that others wait for waits least. On a device it only enqueues.
        self.handle = ""  # what compiled graphs know it by, once `engine.comm.ingraph.register` gave it one
        self._pg = pg
        self._muted = False
        self._calls: dict[tuple[Any, ...], Call] = {}
        # A group of one waits for nobody: there is nothing to record.
        self._blackbox = self.gate.blackbox if len(members) > 1 else None
        self._slot = self._blackbox.open_group(self.label, members) if self._blackbox is not None else 0

    @classmethod
    def solo(cls, name: str = "mesh_pg", gate: PhaseGate | None = None) -> Group:
        """A group of one: no backend, no messages."""
        return cls(name, (Rank(0),), Rank(0), None, gate)

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def group_rank(self) -> GroupRank:
        self._require_member("group_rank")
        return GroupRank(self.members.index(self.rank))

    @property
    def is_leader(self) -> bool:
        return self.rank == self.members[0]

    @contextmanager
    def muted(self) -> Iterator[None]:
        """While the body runs, `all_reduce` leaves its tensor alone: for a rank that tries its code out by itself."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over the group; returns the same tensor. A compiled graph holds it as an operator."""
        if self.handle and _tracing():
            return _in_graph(tensor, self.handle)
        if self._muted:
            return tensor
        self._enter("all_reduce", tensor)
        if self.size > 1:
            with self._backend("all_reduce"):
                dist().all_reduce(tensor, group=self._pg)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every member, in group order."""
        self._enter("all_gather", tensor)
        if self.size == 1:
            return [tensor]
        import torch

        parts = [torch.empty_like(tensor) for _ in self.members]
        with self._backend("all_gather"):
            dist().all_gather(parts, tensor, group=self._pg)
        return parts

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place, from the leader."""
        self._enter("broadcast", tensor)
        if self.size > 1:
            with self._backend("broadcast"):
                dist().broadcast(tensor, src=self.members[0], group=self._pg)
        return tensor

    def barrier(self) -> None:
        """Wait for every member."""
        import torch

        self.all_reduce(torch.zeros(1, dtype=torch.int64))

    def _enter(self, op: str, tensor: torch.Tensor, *, inside: bool = True) -> int:
        """Refuse, or fold into the ledger and the black box; returns the record's number there, 0 without one."""
        self._require_member(op)
        refusal = self.gate.refusal()
        if refusal is not None:
            raise GroupError(
                f"rank {self.rank}: {op} on {self.name}: {refusal}",
                code="TP-3103",
                fm="FM-20",
                ids=self.gate.ids,
                evidence={"group_used": self.name, "op": op, "thread": threading.current_thread().name},
            )
        allowed = ALLOWED[self.gate.phase]
        if self.label not in allowed:
            raise GroupError(
                f"rank {self.rank}: {op} on {self.name} in phase {self.gate.phase.value}{_of(self.gate.ids)}, which "
                f"allows {', '.join(sorted(allowed))} only",
                ids=self.gate.ids,
                evidence={
                    "group_used": self.name,
                    "group_expected": sorted(allowed),
                    "rank": self.rank,
                    "op": op,
                },
                next_step="tpctl runbook show hang-mid-stream",
            )
        key = (op, tensor.shape, tensor.dtype)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = Call.of(self.label, self.members, op, tensor)
        self.ledger.add(call)
        if self._blackbox is None:
            return 0
        return self._blackbox.enter(self._slot, call.signature, call_site(), self.gate.ids, inside=inside)

    @contextmanager
    def _backend(self, op: str) -> Iterator[None]:
        """Turn the backend's failure into ours: a peer that closed its socket, or a timeout."""
        entered_ns = time.perf_counter_ns()
        try:
            yield
        except RuntimeError as error:
            raise self._failure(op, error) from error
        finally:
            self.waited_ns += time.perf_counter_ns() - entered_ns
            if self._blackbox is not None:
                self._blackbox.leave()

    def _failure(self, op: str, error: RuntimeError) -> CommError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return CommError(
            f"rank {self.rank}: {op} on {self.name} failed: {lines[0][:300]}",
            fm="FM-40",
            ids=self.gate.ids,
            evidence={"group": self.name, "op": op, "rank": self.rank},
            next_step="the first cause is another rank's: look at the reports of the other ranks",
        )

    def _require_member(self, op: str) -> None:
        if self.rank not in self.members:
            raise GroupError(
                f"rank {self.rank} is not in {self.name} {list(self.members)}, but called {op}",
                code="TP-3102",
                ids=self.gate.ids,
                evidence={"group_used": self.name, "group_expected": None, "rank": self.rank, "op": op},
            )


def _of(ids: Mapping[str, int]) -> str:
    """The frame in work; nothing where there is none."""
    known = [f"{name} {ids[name]}" for name in ("call_id", "chunk_index", "cache_epoch") if ids.get(name, -1) >= 0]
    return f" of {', '.join(known)}" if known else ""


def dist() -> Any:
    """torch.distributed, imported when the first collective runs."""
    import torch.distributed

    return torch.distributed


def _tracing() -> bool:
    """Is a compiler reading along, instead of the interpreter running this?"""
    import torch

    return torch.compiler.is_compiling()


def _in_graph(tensor: torch.Tensor, handle: str) -> torch.Tensor:
    """Trace our operator (`engine.comm.ingraph`) into the graph that is being made; it comes back here to run."""
    import torch

    torch.ops.tpctl.all_reduce_(tensor, handle)
    return tensor


_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE)) + os.sep
_ENGINE = os.path.dirname(_HERE) + os.sep
# Frames of these files carry a call; they do not make it.
_CARRIERS = frozenset(os.path.join(_HERE, name) for name in ("group.py", "transport.py", "pair.py", "p2p.py"))
_OPERATOR = os.path.join(_HERE, "ingraph.py")
_GRAPHS = frozenset((_OPERATOR, os.path.join(_ENGINE, "model", "compiled.py")))
_sites: dict[tuple[str, int], bytes] = {}


def call_site() -> bytes:
    """The packed file and line that the current collective was called from.

    Of one in a compiled graph: the engine's line that ran the graph, past whatever the compiler made of the forward.
    """
    frame = sys._getframe(3)  # past this function, `_enter` and the collective
    if frame.f_code.co_filename == _OPERATOR:
        while frame.f_back is not None and (
            frame.f_code.co_filename in _GRAPHS or not frame.f_code.co_filename.startswith(_ENGINE)
        ):
            frame = frame.f_back
    while frame.f_code.co_filename in _CARRIERS and frame.f_back is not None:
        frame = frame.f_back
    key = (frame.f_code.co_filename, frame.f_lineno)
    site = _sites.get(key)
    if site is None:
        site = _sites[key] = pack_site(key[0].removeprefix(_ROOT), key[1])
    return site
