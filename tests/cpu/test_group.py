"""The group wrapper refuses before the backend is entered, and the ledger tells calls apart."""

from __future__ import annotations

import pytest
import torch

from engine.comm.group import Group, Phase, PhaseGate, Rank
from engine.errors import GroupError


class Untouchable:
    """Stands where the backend's group would: any use of it fails the test."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the backend was entered: {name}")


def test_phase_b_refuses_world_before_the_backend() -> None:
    gate = PhaseGate(Phase.B, {"call_id": 4, "chunk_index": 2, "cache_epoch": 0})
    world = Group("world_pg", (Rank(0), Rank(1)), Rank(0), Untouchable(), gate)
    with pytest.raises(GroupError) as caught:
        world.all_reduce(torch.zeros(1))
    assert caught.value.evidence["group_used"] == "world_pg"
    assert caught.value.evidence["group_expected"] == ["mesh_pg"]
    assert caught.value.ids == gate.ids
    assert world.ledger.count == 0


def test_a_caller_outside_the_group_is_refused() -> None:
    mesh = Group("mesh_pg", (Rank(1), Rank(2)), Rank(0), Untouchable(), PhaseGate(Phase.B))
    for call in (mesh.all_reduce, mesh.all_gather, mesh.broadcast):
        with pytest.raises(GroupError, match="rank 0 is not in mesh_pg"):
            call(torch.zeros(1))


def test_with_the_guard_off_the_backend_is_entered() -> None:
    """The proof that the refusal above is the guard's work: in a phase that allows the group, the call goes through."""
    world = Group("world_pg", (Rank(0), Rank(1)), Rank(0), Untouchable(), PhaseGate(Phase.HANDSHAKE))
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)):
        world.all_reduce(torch.zeros(1))
    assert world.ledger.count == 1


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
def test_the_ledger_tells_shape_and_dtype_apart(other: torch.Tensor) -> None:
    ours, theirs = Group.solo(), Group.solo()
    ours.all_reduce(torch.zeros(2))
    theirs.all_reduce(torch.zeros(2))
    assert ours.ledger.value() == theirs.ledger.value()
    ours.all_reduce(torch.zeros(2))
    theirs.all_reduce(other)
    assert ours.ledger.value() != theirs.ledger.value()
