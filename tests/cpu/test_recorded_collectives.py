"""What `Group` writes into the black box."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.blackbox import BlackBox, read_box
from engine.comm.group import Call, Group, Phase, PhaseGate, Rank

IDS = {"call_id": 7, "chunk_index": 3, "cache_epoch": 1}


def test_the_phase_of_the_gate_is_the_phase_of_the_box(tmp_path: Path) -> None:
    gate = PhaseGate(blackbox=BlackBox(tmp_path / "box", rank=0))
    assert read_box(tmp_path / "box").live.phase == "handshake"
    gate.phase = Phase.B
    assert read_box(tmp_path / "box").live.phase == "B"


def test_the_group_records_where_it_was_called_from(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0)
    group = Group("mesh_pg", (Rank(0), Rank(1)), Rank(0), None, PhaseGate(Phase.B, dict(IDS), box))
    with pytest.raises(Exception, match=r"."):  # there is no backend: it fails, but it was entered
        group.all_reduce(torch.zeros(2, 3))
    (seen,) = read_box(tmp_path / "box").collectives
    assert seen.file == "tests/cpu/test_recorded_collectives.py"
    assert (seen.op, seen.what, seen.call_id) == ("all_reduce", "float32[2,3]", 7)
    assert read_box(tmp_path / "box").inside is None, "it came back, if only by failing"


@pytest.mark.parametrize(
    "other",
    [
        ("world_pg", (0, 1), "all_reduce", torch.zeros(2)),
        ("mesh_pg", (0, 2), "all_reduce", torch.zeros(2)),
        ("mesh_pg", (0, 1), "all_gather", torch.zeros(2)),
        ("mesh_pg", (0, 1), "all_reduce", torch.zeros(3)),
        ("mesh_pg", (0, 1), "all_reduce", torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_the_hash_tells_group_members_operation_shape_and_dtype_apart(other: tuple) -> None:
    call = Call.of("mesh_pg", (Rank(0), Rank(1)), "all_reduce", torch.zeros(2))
    assert call == Call.of("mesh_pg", (Rank(0), Rank(1)), "all_reduce", torch.ones(2))
    assert call.signature[:8] != Call.of(*other).signature[:8]
