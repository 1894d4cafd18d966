"""The black box keeps the last commitment points, whole, across a `kill -9`, and refuses what is not one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.blackbox import BlackBox, BlackBoxError, Box, Stream, pack_signature, pack_site, read, read_box
from engine.blackbox.layout import COLLECTIVE, COMMIT, DOING, HEADER_BYTES, LIVE_OFFSET
from engine.lifecycle import Doing, RankState

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


class Watched:
    """The box's own lock, which also tells when somebody has to wait for it."""

    def __init__(self, lock: Any, told: threading.Event) -> None:
        self._lock, self._told = lock, told

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._told.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_second_thread_cannot_commit_in_the_middle_of_a_commitment(tmp_path: Path) -> None:
    """In pp the comms thread commits beside the loop. It tries while the first record is being packed: it has to wait,
    or else is through before the first is."""
    box = BlackBox(tmp_path / "box", rank=0)
    waits_or_is_through = threading.Event()
    box._commit_lock = Watched(box._commit_lock, waits_or_is_through)  # type: ignore[assignment]

    def commit() -> None:
        box.commit("send INFER", "pp_pg", {"call_id": 2})
        waits_or_is_through.set()

    comms = threading.Thread(target=commit, daemon=True)

    class Ids(dict[str, int]):
        def get(self, key: str, default: int = -1) -> int:  # type: ignore[override]
            if not comms.ident:
                comms.start()
                assert waits_or_is_through.wait(20)
            return super().get(key, default)

    box.commit("take RESULT", "pp_pg", Ids(call_id=1))
    comms.join(20)
    assert not comms.is_alive()
    seen = [(record.seq, record.action, record.call_id) for record in read(tmp_path / "box")]
    assert seen == [(1, "take RESULT", 1), (2, "send INFER", 2)]


def test_what_the_loop_is_at_is_told_and_a_pause_is_no_period(tmp_path: Path) -> None:
    writer = BlackBox(tmp_path / "box", rank=0)
    with Box(tmp_path / "box") as box:
        assert (box.stream().doing, box.stream().doing_ns, box.stream().resumed_ns) == (Doing.NOTHING, 0, 0)
        for doing in Doing:
            before_ns = time.monotonic_ns()
            writer.enter_doing(doing)
            assert box.stream().doing is doing
            assert before_ns <= box.stream().doing_ns <= time.monotonic_ns()
        writer.count("emitted")
        writer.count("emitted")
        period_ns = box.stream().period_ns
        writer.resume()
        writer.count("emitted")
        assert box.stream().period_ns == period_ns > 0
        assert before_ns <= box.stream().resumed_ns <= box.stream().emit_ns
        emit_ns = box.stream().emit_ns
        writer.count("emitted")
        assert box.stream().period_ns == box.stream().emit_ns - emit_ns
    with (tmp_path / "box").open("r+b") as raw:
        raw.seek(LIVE_OFFSET + 8 * DOING)
        raw.write(bytes([len(Doing)]))
    with Box(tmp_path / "box") as box, pytest.raises(BlackBoxError, match="damaged stream words"):
        box.stream()


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


def enter(box: BlackBox, count: int = 1) -> None:
    slot = box.open_group("mesh_pg", (0, 1))
    for _ in range(count):
        box.enter(slot, pack_signature(5, "mesh_pg", "all_reduce", "float32[2]"), pack_site("x.py", 3), IDS)


def test_a_collective_is_recorded_when_it_is_entered(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=1)
    enter(box)
    box.leave()
    enter(box)
    seen = read_box(tmp_path / "box")
    first, second = seen.collectives
    assert (first.place, second.place) == (1, 2)
    assert (second.group, second.op, second.what, second.site) == ("mesh_pg", "all_reduce", "float32[2]", "x.py:3")
    assert (second.hash_u64, second.call_id, second.chunk_index, second.cache_epoch) == (5, 7, 3, 1)
    assert seen.inside == second
    assert seen.groups[0].ranks == (0, 1)
    assert seen.live.counts == (2,)
    box.leave()
    assert read_box(tmp_path / "box").inside is None


def test_state_and_phase_are_live(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0)
    assert read_box(tmp_path / "box").live.state is RankState.STARTING
    box.enter_state(RankState.WARMING)
    box.enter_phase("handshake")
    box.enter_phase("B")
    assert read_box(tmp_path / "box").live.state is RankState.WARMING
    assert read_box(tmp_path / "box").live.phase == "B"


def test_a_full_ring_of_collectives_leaves_the_commitment_points_alone(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0, slots=8)
    box.commit("enter B", "mesh_pg", IDS)
    enter(box, 30)
    seen = read_box(tmp_path / "box")
    assert [record.action for record in seen.commitments] == ["enter B"]
    assert [entry.place for entry in seen.collectives] == list(range(23, 31))
    assert seen.live.counts == (30,)


def test_killed_inside_a_collective_the_box_says_which(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from engine.blackbox import BlackBox, pack_signature, pack_site\n"
        "box = BlackBox(Path(sys.argv[1]), 0); slot = box.open_group('mesh_pg', (0, 1))\n"
        "box.enter(slot, pack_signature(1, 'mesh_pg', 'broadcast', 'uint8[64]'), pack_site('y.py', 9), {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "box")], timeout=30, check=False)
    inside = read_box(tmp_path / "box").inside
    assert inside is not None
    assert (inside.op, inside.site) == ("broadcast", "y.py:9")


def damage(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x40
    path.write_bytes(raw)


@pytest.mark.parametrize("ring", ["commitments", "collectives"])
def test_a_damaged_record_is_refused_unless_it_was_being_written_over(ring: str, tmp_path: Path) -> None:
    slots = 8
    box = BlackBox(tmp_path / "box", rank=0, slots=slots)
    for _ in range(20):
        box.commit("x", "mesh_pg", IDS)
    enter(box, 20)
    size = COMMIT.size if ring == "commitments" else COLLECTIVE.size
    start = HEADER_BYTES + (0 if ring == "commitments" else slots * COMMIT.size)
    sound = (tmp_path / "box").read_bytes()
    # Record 13 is the oldest of 20 in 8 slots: its slot is the next to be written.
    damage(tmp_path / "box", start + (13 - 1) % slots * size + 20)
    records = getattr(read_box(tmp_path / "box"), ring)
    assert [record.seq for record in records] == list(range(14, 21))
    (tmp_path / "box").write_bytes(sound)
    damage(tmp_path / "box", start + (16 - 1) % slots * size + 20)
    with pytest.raises(BlackBoxError, match="1 damaged record"):
        read_box(tmp_path / "box")


@pytest.mark.parametrize(("offset", "words"), [(16, "damaged header"), (64, "damaged live words"), (260, "group")])
def test_damage_in_the_head_is_refused(offset: int, words: str, tmp_path: Path) -> None:
    enter(BlackBox(tmp_path / "box", rank=0))
    damage(tmp_path / "box", offset)
    with pytest.raises(BlackBoxError, match=words):
        read_box(tmp_path / "box")


def test_a_reader_that_holds_the_box_sees_it_grow_and_its_cutting(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0)
    with Box(tmp_path / "box") as reading:
        assert reading.live().collectives == 0
        enter(box, 3)
        assert reading.live().collectives == 3
        assert len(reading.collectives(1, 3)) == 2
        enter(BlackBox(tmp_path / "box", rank=0))  # a new life of the rank: a new file
        assert reading.live().collectives == 3
        assert read_box(tmp_path / "box").live.collectives == 1
        (tmp_path / "cut").write_bytes((tmp_path / "box").read_bytes())
    with Box(tmp_path / "cut") as reading:
        (tmp_path / "cut").write_bytes(b"TPCTL")
        with pytest.raises(BlackBoxError, match="cut short while it was read"):
            reading.live()


def test_reading_beside_a_busy_writer_never_sees_a_torn_record(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from engine.blackbox import BlackBox, pack_signature, pack_site\n"
        "box = BlackBox(Path(sys.argv[1]), 0, slots=64); slot = box.open_group('mesh_pg', (0, 1))\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    box.enter(slot, pack_signature(number, 'mesh_pg', 'op', 'w'), pack_site('y.py', 9), {'call_id': number})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "box")])
    try:
        while not (tmp_path / "box").exists():
            assert writer.poll() is None
        with Box(tmp_path / "box") as reading:
            seen = 0
            for _ in range(300):
                entries = reading.contents().collectives
                assert all(entry.hash_u64 == entry.call_id == entry.place == entry.seq for entry in entries)
                seen = max(seen, *(entry.seq for entry in entries), 0, 0)
        assert seen > 1000
    finally:
        writer.kill()
        writer.wait(10)


def test_no_room_is_said_before_the_rank_starts(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from engine.blackbox import BlackBox, BlackBoxError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: BlackBox(Path(sys.argv[1]), 0)\n"
        "except BlackBoxError as error: print(error.code, error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "box")], timeout=30, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("TP-6202 rank 0 cannot make its black box")
    assert not (tmp_path / "box").exists()


def test_the_account_of_the_stream_and_the_last_commitment_are_there_while_it_runs(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0, slots=8)
    with Box(tmp_path / "box") as seen:
        assert seen.last_commitment() is None
        assert seen.stream() == Stream(0, 0, 0, 0, 0)
        for fate in ("accepted", "accepted", "accepted", "emitted", "dropped"):
            box.count(fate)
        first = seen.stream()
        assert (first.accepted, first.emitted, first.dropped, first.period_ns) == (3, 1, 1, 0)
        box.count("emitted")
        second = seen.stream()
        assert second.period_ns == second.emit_ns - first.emit_ns > 0
        for call_id in range(20):
            box.commit("x", "mesh_pg", {"call_id": call_id})
        last = seen.last_commitment()
        assert last is not None
        assert (last.seq, last.call_id) == (20, 19)
