"""The pp link over real gloo, both ends in one process: order, repeats, refusals, and an end that does not wait."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.blackbox import BlackBox, read, read_box
from engine.comm.group import Phase, PhaseGate, Rank
from engine.comm.p2p import LeaderEnd, Stage0End, messages
from engine.comm.pair import Pair
from engine.config import EngineConfig
from engine.errors import (
    CallCountError,
    CommError,
    EngineError,
    FrameError,
    GroupError,
    PeerError,
    PreflightError,
    SinkError,
)
from engine.overlap import Comms
from engine.plan import PP1
from engine.streams import CommStream
from engine.watchdog import Watchdog
from engine.wire.expected import Expectations, Fate
from engine.wire.frame import PayloadBuffer, PreparedFrame, prepare_control
from engine.wire.header import Action, Limits, LinkState
from engine.wire.meta import error_meta
from engine.wire.result import Result
from tests.cpu.wire_cases import SHAPES, make, ramp

DEADLINE_S = 20.0
ANSWER = Result(7, 3, 1, 0, True, None, None, 3, 12, -5, 12.5, 0.25, ramp(1, 3, 2, 2, 2))


@dataclass
class Ends:
    """Both ends, each with a thread of its own for what waits."""

    stage0: Stage0End
    leader: LeaderEnd
    boxes: tuple[Path, Path]
    threads: ThreadPoolExecutor
    groups: list[Any]

    def later(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        return self.threads.submit(call, *args)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    store = dist.HashStore()
    threads = ThreadPoolExecutor(4)
    timeout = datetime.timedelta(seconds=DEADLINE_S)
    groups = [
        future.result(DEADLINE_S)
        for future in [threads.submit(dist.ProcessGroupGloo, store, rank, 2, timeout) for rank in (0, 1)]
    ]
    made, boxes = [], (tmp_path / "box0", tmp_path / "box1")
    for rank, end in enumerate((Stage0End, LeaderEnd)):
        gate = PhaseGate(Phase.LINK, blackbox=BlackBox(boxes[rank], rank))
        pair = Pair.of((Rank(0), Rank(1)), Rank(rank), groups[rank], gate)
        made.append(end(pair, Limits(), SHAPES, PP1, gate.blackbox))
        made[-1].state = LinkState(last_call_id=6, last_chunk_index=2, cache_epoch=1)
    made[1]._answers = LinkState(last_call_id=6, last_chunk_index=2, cache_epoch=1)
    yield Ends(made[0], made[1], boxes, threads, groups)
    groups.clear()
    for end in made:  # closes the connections, so that whoever still waits ends
        for channel in (end.pair.down, end.pair.up):
            channel._pg = None
    threads.shutdown(wait=False)


def control(state: LinkState, action: Action, **meta: Any) -> PreparedFrame:
    return prepare_control(action, call_id=state.last_call_id + 1, link=state, **meta)


def test_envelopes_go_down_and_answers_come_up(ends: Ends) -> None:
    envelope = make(PP1)
    room = ends.stage0.expect()
    ends.stage0.post(ends.stage0.prepare(envelope))
    received = ends.leader.receive()
    assert received is not None
    assert received.envelope is not None
    assert received.envelope.plan == envelope.plan
    assert torch.equal(received.envelope.tensors["latents"], envelope.tensors["latents"])
    answering = ends.later(ends.leader.answer, ANSWER)
    room.wait()
    back = ends.stage0.read(room)
    answering.result(DEADLINE_S)
    assert (back.ids(), back.ok, back.mesh_current_start_frame) == (ANSWER.ids(), True, 12)
    assert torch.equal(back.latents_out_BFCHW, ANSWER.latents_out_BFCHW)
    ends.stage0.settle(7)
    assert [record.action for record in read(ends.boxes[1])] == ["wait header", "recv INFER", "send RESULT"]


def test_stage0_goes_on_while_nobody_receives(ends: Ends) -> None:
    """Two whole envelopes are posted before the leader reads its first byte; no room of one is used for the other."""
    first, second = make(PP1), make(PP1, chunk_index=4, current_start_frame=12)
    first.tensors["latents"].add_(1)
    for envelope in (first, second):
        ends.stage0.post(ends.stage0.prepare(envelope))
    for envelope in (first, second):
        received = ends.leader.receive()
        assert received is not None
        assert received.envelope is not None
        assert torch.equal(received.envelope.tensors["latents"], envelope.tensors["latents"])
    ends.stage0.settle(8)
    assert len(ends.stage0._buffers) == 2


def test_both_directions_agree_on_their_ledgers_whatever_order_they_run_in(ends: Ends) -> None:
    test_envelopes_go_down_and_answers_come_up(ends)
    for way in ("down", "up"):
        assert getattr(ends.stage0.pair, way).ledger.value() == getattr(ends.leader.pair, way).ledger.value()
    ours, theirs = (read_box(box) for box in ends.boxes)
    keys = [{(c.group, c.place, c.hash_u64) for c in box.collectives} for box in (ours, theirs)]
    assert keys[0] == keys[1]
    assert {group for group, _, _ in keys[0]} == {"pp_pg.down", "pp_pg.up"}
    assert ours.live.inside == 0


def test_an_exact_repeat_is_dropped_and_recorded_once_only(ends: Ends) -> None:
    frame = ends.stage0.prepare(make(PP1))
    posted = [ends.stage0.pair.down.post(message) for _ in range(2) for message in messages(frame)]
    assert ends.leader.receive() is not None
    before = dataclasses.replace(ends.leader.state)
    assert ends.leader.receive() is None
    assert (ends.leader.repeats, ends.leader.state) == (1, before)
    assert read(ends.boxes[1])[-1].action == "drop repeat"
    for message in posted:
        message.wait()
    ends.stage0.state.advance(frame.header)
    ends.stage0.post(control(ends.stage0.state, Action.NOOP))  # the stream is still whole
    noop = ends.leader.receive()
    assert noop is not None
    assert noop.header.action is Action.NOOP


def test_any_other_repeat_is_refused(ends: Ends) -> None:
    frame = ends.stage0.prepare(make(PP1))
    ends.stage0.post(frame)
    ends.stage0.post(control(ends.stage0.state, Action.NOOP))
    again = [ends.stage0.pair.down.post(message) for message in messages(frame)]
    assert ends.leader.receive() is not None
    assert ends.leader.receive() is not None
    with pytest.raises(FrameError) as caught:
        ends.leader.receive()
    assert caught.value.field == "call_id"
    again[0].wait()


def test_what_stage0_refuses_to_send_never_leaves(ends: Ends) -> None:
    with pytest.raises(PreflightError):
        ends.stage0.prepare(dataclasses.replace(make(PP1), prompt="a fox"))
    ends.stage0.post(control(ends.stage0.state, Action.SHUTDOWN))
    received = ends.leader.receive()
    assert received is not None
    assert received.header.action is Action.SHUTDOWN


def test_error_reaches_the_leader(ends: Ends) -> None:
    meta = error_meta(FrameError("it broke", field="x"))
    ends.stage0.post(control(ends.stage0.state, Action.ERROR, meta=meta))
    with pytest.raises(PeerError, match="it broke"):
        ends.leader.receive()


@pytest.mark.parametrize("words", ["short", "long " * 800], ids=["inline", "in its own message"])
def test_an_error_result_comes_up(words: str, ends: Ends) -> None:
    room = ends.stage0.expect()
    answering = ends.later(ends.leader.answer, Result.failed(ANSWER.ids(), 0, "TP-2206", words))
    room.wait()
    back = ends.stage0.read(room)
    answering.result(DEADLINE_S)
    assert (back.ok, back.error_code, back.error_message) == (False, "TP-2206", words)


def test_the_end_that_waits_hears_that_the_other_is_gone(ends: Ends) -> None:
    room = ends.stage0.expect()
    waiting = ends.later(room.wait)
    ends.groups.clear()
    ends.leader.pair.down._pg = ends.leader.pair.up._pg = None
    with pytest.raises(CommError, match="message on pp_pg failed"):
        waiting.result(DEADLINE_S)


def test_while_a_thread_owns_the_groups_a_second_caller_gets_an_error(ends: Ends) -> None:
    gate, entered, leave = ends.stage0.gate, threading.Event(), threading.Event()

    def own() -> None:
        with gate.owned():
            ends.stage0.expect()  # the owner may
            entered.set()
            leave.wait(DEADLINE_S)

    owner = ends.later(own)
    assert entered.wait(DEADLINE_S)
    count = ends.stage0.pair.up.ledger.count
    with pytest.raises(GroupError, match="the comms thread owns the groups") as caught:
        ends.stage0.expect()
    assert (caught.value.code, ends.stage0.pair.up.ledger.count) == ("TP-3103", count)
    leave.set()
    owner.result(DEADLINE_S)
    ends.stage0.expect()
    gate.poisoned = True
    with pytest.raises(GroupError, match="nobody touches the groups again"):
        ends.stage0.expect()


@pytest.fixture
def comms(ends: Ends, tmp_path: Path) -> Iterator[Callable[..., Comms]]:
    """Makes Stage 0's comms thread over this link; what ends a rank here is kept in `left`, in place of a process."""
    watchdog = Watchdog(lambda deadline: None)

    def make(left: list[EngineError], **pipeline: Any) -> Comms:
        config = EngineConfig()
        made = Comms(
            ends.stage0,
            dataclasses.replace(config.pipeline, **pipeline),
            config.liveness,
            watchdog,
            CommStream("cpu"),
            left.append,
        )
        made.start()
        return made

    yield make
    watchdog.close()


@pytest.mark.parametrize("ours", [PreflightError, CallCountError, SinkError])
def test_what_is_stage0s_own_lets_the_mesh_drain(
    ours: type[EngineError], ends: Ends, comms: Callable[..., Comms]
) -> None:
    """Also while an answer is awaited: the error is known before the farewell is chosen."""
    talking = comms([])
    talking.put(make(PP1))
    assert ends.later(ends.leader.receive).result(DEADLINE_S) is not None
    answering = ends.later(ends.leader.answer, ANSWER)
    closing = ends.later(talking.close, ours("Stage 0 cannot go on"))
    received = ends.later(ends.leader.receive).result(DEADLINE_S)
    assert received is not None
    assert received.header.action is Action.SHUTDOWN
    answering.result(DEADLINE_S)
    closing.result(DEADLINE_S)


def test_what_breaks_the_stream_is_told_to_the_mesh(ends: Ends, comms: Callable[..., Comms]) -> None:
    closing = ends.later(comms([]).close, FrameError("it broke", field="x"))
    with pytest.raises(PeerError, match="it broke"):
        ends.later(ends.leader.receive).result(DEADLINE_S)
    closing.result(DEADLINE_S)


def test_a_poisoned_comms_thread_uses_no_group_even_when_its_answer_comes_at_last(
    ends: Ends, comms: Callable[..., Comms]
) -> None:
    """Its rank would be gone by then. Here it goes on living, and meets the gate."""
    left: list[EngineError] = []
    talking = comms(left, join_timeout_s=0.2)
    talking.put(make(PP1))
    received = ends.later(ends.leader.receive).result(DEADLINE_S)
    assert received is not None
    talking.close(SinkError("the disk is full"))
    assert [(error.code, error.exit_code) for error in left] == [("TP-6404", 76)]
    assert left[0].evidence == {"unanswered": [7]}

    counts = [ends.stage0.pair.down.ledger.count, ends.stage0.pair.up.ledger.count]
    answering = ends.later(ends.leader.answer, ANSWER)
    talking._thread.join(DEADLINE_S)
    assert not talking._thread.is_alive()
    assert isinstance(talking.failure, GroupError)
    assert "nobody touches the groups again" in str(talking.failure)
    assert [ends.stage0.pair.down.ledger.count, ends.stage0.pair.up.ledger.count] == counts
    assert not answering.done()  # its second message has no room at the other end, and never will


def test_a_result_of_another_shape_makes_no_room_for_its_payload(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    ends.leader.shapes = dataclasses.replace(SHAPES, latent_h=SHAPES.latent_h + 1)
    wide = dataclasses.replace(ANSWER, latents_out_BFCHW=ramp(1, 3, 2, SHAPES.latent_h + 1, 2))
    room = ends.stage0.expect()
    ends.later(ends.leader.answer, wide)
    room.wait()
    made: list[int] = []
    monkeypatch.setattr(PayloadBuffer, "view", lambda _, nbytes: made.append(nbytes))
    count = ends.stage0.pair.up.ledger.count
    with pytest.raises(FrameError, match="latents_out") as caught:
        ends.stage0.read(room)
    assert caught.value.field == "latents_out"
    assert (made, ends.stage0.pair.up.ledger.count) == ([], count)


def test_hand_over_waits_for_what_may_go_out_and_for_nothing_else(ends: Ends, comms: Callable[..., Comms]) -> None:
    left: list[EngineError] = []
    talking = comms(left, d_out=1, join_timeout_s=DEADLINE_S)
    for chunk in (3, 4):
        talking.put(make(PP1, chunk_index=chunk, current_start_frame=3 * chunk))
        talking.hand_over()
    sent = [entry.chunk_index for entry in read(ends.boxes[0]) if entry.action == "send INFER"]
    assert sent == [3]  # there is room for one answer
    assert talking.depths() == (1, 0)
    assert ends.later(ends.leader.receive).result(DEADLINE_S) is not None
    answering = ends.later(ends.leader.answer, ANSWER)
    arrival, fate = talking.take(lambda: 1)
    assert (arrival.result.chunk_index, fate) == (3, Fate.ACCEPTED)
    answering.result(DEADLINE_S)
    talking.hand_over()
    assert [entry.chunk_index for entry in read(ends.boxes[0]) if entry.action == "send INFER"] == [3, 4]
    ends.leader.receive()
    second = dataclasses.replace(ANSWER, call_id=8, chunk_index=4, mesh_current_start_frame=15)
    ends.later(ends.leader.answer, second)
    leaving = ends.later(ends.leader.receive)  # SHUTDOWN
    talking.close()
    assert leaving.result(DEADLINE_S).header.action is Action.SHUTDOWN
    assert left == []
    talking.hand_over()  # closed: nothing to wait for


def test_without_a_device_there_is_nothing_to_order() -> None:
    comm = CommStream("cpu")
    tensor = torch.ones(3)
    assert comm.mark() is None
    assert comm.to_host({"x": tensor}, None)["x"] is tensor
    assert comm.to_device(tensor) == (tensor, None)


def flying(*ids: tuple[int, int, int]) -> Expectations:
    expected = Expectations()
    for each in ids:
        expected.sent(*each)
    return expected


def test_results_are_accepted_in_order_and_once() -> None:
    expected = flying((4, 0, 0), (6, 1, 0))
    assert expected.judge(4, 0, 0, 0) is Fate.ACCEPTED
    assert expected.judge(4, 0, 0, 0) is Fate.REPEATED
    assert expected.judge(6, 1, 0, 0) is Fate.ACCEPTED
    assert len(expected) == 0


def test_a_result_of_an_older_epoch_is_stale_once_and_a_repeat_after_that() -> None:
    expected = flying((4, 0, 0), (5, 1, 0), (6, 2, 1))
    assert expected.judge(4, 0, 0, 1) is Fate.STALE
    assert expected.judge(4, 0, 0, 1) is Fate.REPEATED  # not a second share of what was accepted
    assert expected.judge(5, 1, 0, 1) is Fate.STALE
    assert expected.judge(6, 2, 1, 1) is Fate.ACCEPTED


def test_a_lost_stale_result_does_not_block_the_new_epoch() -> None:
    assert flying((4, 0, 0), (6, 1, 1)).judge(6, 1, 1, 1) is Fate.ACCEPTED


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ((6, 1, 0), "ahead of that for chunk 0"),
        ((9, 2, 0), "nobody asked"),
        ((4, 1, 0), "asked for chunk 0"),
        ((4, 0, 1), "asked for chunk 0"),
    ],
)
def test_what_is_ahead_or_was_never_asked_is_a_crash(ids: tuple[int, int, int], words: str) -> None:
    expected = flying((4, 0, 0), (6, 1, 0))
    with pytest.raises(FrameError, match=words):
        expected.judge(*ids, 0)
    assert len(expected) == 2
