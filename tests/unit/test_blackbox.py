"""The black box keeps the last commitment points, whole, across a `kill -9`, and refuses what is not one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.blackbox import BlackBox, BlackBoxError, read

IDS = {"call_id": 7, "chunk_index": 3, "cache_epoch": 1}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=2)
    box.commit("send INFER", "mesh_pg", IDS)
    box.commit("enter B", "mesh_pg", {})
    first, second = read(tmp_path / "box")
    assert (first.seq, first.action, first.group) == (1, "send INFER", "mesh_pg")
    assert (first.call_id, first.chunk_index, first.cache_epoch) == (7, 3, 1)
    assert (second.seq, second.call_id) == (2, -1)
    assert second.t_ns >= first.t_ns


def test_the_ring_keeps_the_newest(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0, slots=8)
    for call_id in range(20):
        box.commit("x", "mesh_pg", {"call_id": call_id})
    assert [record.call_id for record in read(tmp_path / "box")] == list(range(12, 20))


def test_it_survives_kill_9(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from engine.blackbox import BlackBox\n"
        "box = BlackBox(Path(sys.argv[1]), 0); box.commit('enter B', 'mesh_pg', {'call_id': 5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "box")], timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [(r.action, r.call_id) for r in read(tmp_path / "box")] == [("enter B", 5)]


@pytest.mark.parametrize("damage", ["foreign", "short", "version"])
def test_a_damaged_box_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "box"
    BlackBox(path, rank=0)
    raw = bytearray(path.read_bytes())
    if damage == "foreign":
        raw[:8] = b"NOTABOX!"
    elif damage == "short":
        del raw[-10:]
    else:
        raw[8] = 99
    path.write_bytes(raw)
    with pytest.raises(
        BlackBoxError, match={"foreign": "not a", "short": "cut short", "version": "version 99"}[damage]
    ):
        read(path)
