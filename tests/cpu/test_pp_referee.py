"""The referee beside a real pp link: at full speed it sees nothing wrong, and one lost answer is proved a deadlock."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

from engine.comm.p2p import LeaderEnd
from engine.config import LivenessConfig, PipelineConfig
from engine.overlap import Comms
from engine.plan import PP1
from engine.referee.judge import Kind, Verdict, judge
from engine.referee.watch import Watch
from engine.streams import CommStream
from engine.watchdog import Watchdog
from engine.wire.header import Action
from tests.cpu.test_pp_link import ANSWER, DEADLINE_S, Ends, ends
from tests.cpu.wire_cases import make

assert ends
CHUNKS = 200
WATCH_S = 60.0  # looking without a break, the referee slows the link down
FIRST = ANSWER.chunk_index


def answer(end: LeaderEnd, number: int) -> None:
    ids = {"call_id": ANSWER.call_id + number, "chunk_index": FIRST + number}
    end.answer(dataclasses.replace(ANSWER, **ids))


def serve(end: LeaderEnd, has: threading.Semaphore) -> None:
    """One answer to each envelope but the last one, two by two: the first of them waits for the second envelope."""
    while (received := end.receive()) is not None and received.header.action is not Action.SHUTDOWN:
        if received.header.action is not Action.INFER:
            continue
        number = received.header.chunk_index - FIRST
        if number % 2 == 0:
            has.release()
            continue
        answer(end, number - 1)
        if number < CHUNKS - 1:
            answer(end, number)


def stream(comms: Comms, has: threading.Semaphore) -> int:
    """Stage 0, slow with each second envelope: the leader waits for it. Returns how many results came."""
    comms.start()
    taken = 0
    for number in range(CHUNKS):
        if number % 2:
            assert has.acquire(timeout=WATCH_S)
        start = 3 * (FIRST + number)
        comms.put(make(PP1, recompute=False, chunk_index=FIRST + number, current_start_frame=start))
        while number % 2 and taken <= number:
            comms.take(lambda: 1)
            taken += 1
    comms.close()
    return taken


def test_a_link_at_full_speed_is_no_deadlock_and_a_lost_answer_is_one(ends: Ends, tmp_path: Path) -> None:
    ranks = tmp_path / "run" / "ranks"
    ranks.mkdir(parents=True)
    for rank, box in enumerate(ends.boxes):
        (ranks / f"rank{rank}.blackbox").symlink_to(box)
    watchdog = Watchdog(lambda _: None)
    comms = Comms(ends.stage0, PipelineConfig(), LivenessConfig(), watchdog, CommStream("cpu"), lambda error: None)
    has = threading.Semaphore(0)
    leader, stage0 = ends.later(serve, ends.leader, has), ends.later(stream, comms, has)
    last = ANSWER.chunk_index + CHUNKS - 1

    # Where a verdict comes too early the stream goes on to its end all the same, and nothing is left behind.
    verdicts: list[tuple[int, Verdict]] = []
    watch, looks, deadline_s = Watch(tmp_path / "run", (0, 1)), 0, time.monotonic() + WATCH_S
    while time.monotonic() < deadline_s and not (verdicts and ends.leader.state.last_chunk_index == last):
        snapshot = watch.look()
        looks += 1
        if (verdict := judge(snapshot)) is not None and not verdicts:
            verdicts.append((ends.leader.state.last_chunk_index, verdict))
    answer(ends.leader, CHUNKS - 1)
    assert stage0.result(DEADLINE_S) == CHUNKS
    leader.result(DEADLINE_S)
    watchdog.close()

    assert verdicts, looks
    reached, verdict = verdicts[0]
    assert reached == last, verdict.message
    assert (verdict.kind, verdict.triggers, verdict.victims) == (Kind.DEADLOCK, (), (0, 1))
    assert "rank 0 waits in message" in verdict.message
    assert "of pp_pg.up" in verdict.message
    assert "rank 1 waits in message" in verdict.message
    assert looks > 20  # it did look while the link was busy
    assert judge(watch.look()) is None
