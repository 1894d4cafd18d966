"""Stage 0's comms thread, and the two bounded queues between it and phases A and C (contract, section 11).

    Stage 0   put(envelope) -> d_in  -> comms thread -> link     -> mesh
              take()        <- d_out <- comms thread <- link     <- mesh

The comms thread owns the process groups while it lives. It never waits for the leader in one direction alone: what it
sends is posted, room for the next answer is posted before, and an envelope goes out only when `d_out` has a place left
for its answer. So a full queue, or a slow sink, never holds up the leader, and neither end can wait for ever.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.comm.p2p import Stage0End
from engine.comm.pair import Posted
from engine.config import LivenessConfig, PipelineConfig
from engine.errors import CallCountError, CommError, EngineError, PeerError, PreflightError, SinkError
from engine.lifecycle import RankExit
from engine.streams import CommStream
from engine.watchdog import Watchdog
from engine.wire.envelope import Envelope
from engine.wire.expected import Expectations, Fate
from engine.wire.frame import prepare_control
from engine.wire.header import Action
from engine.wire.meta import error_meta
from engine.wire.result import Result

A_RESULT = "the wait for a result"
OURS_ALONE = (PreflightError, CallCountError, SinkError)  # ours alone: the mesh is well, and drains


@dataclass(frozen=True)
class Arrival:
    """A result as the comms thread received it; `made` orders its latents before their reader on a device.

    When its envelope was posted and when it was here itself, in monotonic seconds; an answer that comes twice has no
    envelope any more.
    """

    result: Result
    made: Any
    arrived_s: float
    sent_s: float | None = None


class Comms:
    """The thread, and Stage 0's side of it. `repeats` counts answers that came twice.

    Args:
        link: rank 0's end of the pp link.
        pipeline, live: depths and deadlines.
        watchdog: ends the rank when the leader does not answer.
        stream: of the device that Stage 0 works on.
        poison: called if the thread does not end in time; must not return.
    """

    def __init__(
        self,
        link: Stage0End,
        pipeline: PipelineConfig,
        live: LivenessConfig,
        watchdog: Watchdog,
        stream: CommStream,
        poison: Callable[[EngineError], None],
    ) -> None:
        self._link = link
        self._pipeline = pipeline
        self._live = live
        self._watchdog = watchdog
        self._stream = stream
        self._poison = poison
        self._changed = threading.Condition()
        self._d_in: deque[tuple[Envelope, Any]] = deque()
        self._d_out: deque[Arrival] = deque()
        self._most = (0, 0)
        self._expected = Expectations()
        self._unanswered: dict[int, float] = {}  # call_id of an envelope, and when it was posted
        self._room: Posted | None = None  # posted for the next answer
        self._arrived: Posted | EngineError | None = None
        self._farewell: EngineError | None = None
        self._closing = False
        self._rest: set[str] = set()  # the threads that wait, of Stage 0's two
        self._told = False
        self._sending = False  # one envelope is out of `d_in`, and not posted yet
        self.failure: BaseException | None = None
        self._posted: queue.SimpleQueue[Posted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="comms", daemon=True)
        self._waiter = threading.Thread(target=self._wait_for_rooms, name="comms-arrival", daemon=True)

    # Stage 0's side ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._waiter.start()
        self._thread.start()

    def room(self) -> bool:
        """Whether `put` would find a place. Only Stage 0 fills the queue, so a place stays one."""
        with self._changed:
            return len(self._d_in) < self._pipeline.d_in

    def put(self, envelope: Envelope) -> None:
        """Queue an envelope. It never waits: Stage 0 alone empties `d_out`, so a wait here could be for itself.

        Raises:
            EngineError: the queue is full, or whatever ended the comms thread.
        """
        made = self._stream.mark()
        with self._changed:
            self._raise_failure()
            if len(self._d_in) >= self._pipeline.d_in:
                raise EngineError(f"d_in holds {len(self._d_in)} envelopes already", code="TP-6405")
            self._d_in.append((envelope, made))
            self._note_depths()
            plan = envelope.plan
            self._link.commit("queue INFER", {"chunk_index": plan.chunk_index, "cache_epoch": plan.cache_epoch})
            self._changed.notify_all()

    def hand_over(self) -> None:
        """Wait until every envelope that may go out now is out: k + 1 goes out before result k is decoded.

        Returns as well where that can no longer be; the next `take` says why.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure is not None or self._closing or not (self._sending or self._may_send())
            )

    def take(self, epoch: Callable[[], int]) -> tuple[Arrival, Fate]:
        """Wait for the next result, and judge it against what is expected; `epoch` tells Stage 0's current one.

        Raises:
            FrameError: a result ahead of what is expected, or one that nobody asked for.
            EngineError: whatever ended the comms thread.
        """
        with self._changed:
            with self._resting("stage0"):
                self._changed.wait_for(lambda: self._d_out or self.failure is not None)
            if not self._d_out:
                self._raise_failure()
            arrival = self._d_out.popleft()
            result = arrival.result
            self._link.commit("take RESULT", result.ids())
            fate = self._expected.judge(result.call_id, result.chunk_index, result.cache_epoch, epoch())
            self._changed.notify_all()
        if arrival.result.latents_out_BFCHW is not None:
            self._stream.receive([arrival.result.latents_out_BFCHW], arrival.made)
        return arrival, fate

    def well(self) -> bool:
        """True. Raises EngineError: whatever ended the comms thread."""
        with self._changed:
            self._raise_failure()
        return True

    def depths(self) -> tuple[int, int]:
        """Envelopes in `d_in`, results in `d_out`."""
        with self._changed:
            return len(self._d_in), len(self._d_out)

    def most(self) -> tuple[int, int]:
        """The most that `d_in` and `d_out` ever held."""
        return self._most

    def _note_depths(self) -> None:
        self._most = max(self._most[0], len(self._d_in)), max(self._most[1], len(self._d_out))

    def close(self, error: BaseException | None = None) -> None:
        """Receive what is still on its way, say SHUTDOWN (or ERROR, if `error` is the mesh's business), and join.

        What was queued and never sent is dropped. If the thread does not end by its deadline, the rank is poisoned.

        Raises:
            EngineError: what ended the comms thread, unless it is `error` itself.
        """
        with self._changed:
            self._closing = True
            self._d_in.clear()
            self._d_out.clear()
            if isinstance(error, EngineError) and not isinstance(error, OURS_ALONE):
                self._farewell = error
            self._changed.notify_all()
        self._thread.join(self._pipeline.join_timeout_s)
        if self._thread.is_alive():
            self._link.gate.poisoned = True
            self._poison(
                EngineError(
                    f"the comms thread did not end within {self._pipeline.join_timeout_s:g} s; "
                    "no process group is touched again",
                    code="TP-6404",
                    fm="FM-21",
                    exit_code=int(RankExit.POISONED),
                    evidence={"unanswered": sorted(self._unanswered)},
                )
            )
        if error is None:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    # The comms thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._link.gate.owned():
            try:
                self._serve()
            except CommError as error:
                self._fail(self._last_word(error))
            except BaseException as error:  # noqa: BLE001 - latched here, raised by Stage 0's next call
                self._fail(error)
        for name in (A_RESULT, "the heartbeat", "the farewell"):
            self._watchdog.disarm(name)
        self._posted.put(None)

    def _serve(self) -> None:
        """One act a turn: take in what arrived, else send what waits, else leave, else a heartbeat."""
        self._expect()
        beat_at = time.monotonic() + self._live.heartbeat_s
        while True:
            with self._changed:
                with self._resting("comms"):
                    self._changed.wait_for(
                        lambda: self._arrived is not None or self._may_send() or self._may_leave(),
                        None if self._unanswered else max(0.0, beat_at - time.monotonic()),
                    )
                arrived, may_send, may_leave = self._arrived, self._may_send(), self._may_leave()
            if arrived is not None:
                self._take_in(arrived)
            elif may_send:
                self._send()
            elif may_leave:
                self._say_farewell()
                return
            else:
                self._beat()
            beat_at = time.monotonic() + self._live.heartbeat_s

    def _last_word(self, lost: CommError) -> EngineError:
        """A leader that refuses a frame in its middle answers and leaves: its answer says more than the lost link."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived is not None, self._live.heartbeat_s)
            arrived = self._arrived
        if isinstance(arrived, EngineError) or arrived is None:
            return lost
        try:
            self._take_in(arrived)
        except EngineError as said:
            return said
        return lost

    def _may_send(self) -> bool:
        """A place in `d_out` is kept for every answer: none is sent while results wait in all of them."""
        return bool(self._d_in) and len(self._unanswered) + len(self._d_out) < self._pipeline.d_out

    @contextmanager
    def _resting(self, who: str) -> Iterator[None]:
        """One of the two threads waits for something to change; the caller holds the lock."""
        self._rest.add(who)
        self._tell()
        try:
            yield
        finally:
            self._rest.discard(who)
            self._tell()

    def _tell(self) -> None:
        """Say in the black box whether an answer is all that can wake either thread: then nothing is sent before it."""
        tells = (
            len(self._rest) == 2
            and bool(self._unanswered)
            and self._arrived is None
            and not self._d_out
            and self.failure is None
            and not self._may_send()
        )
        if tells is not self._told:
            self._told = tells
            self._link.rest(self._room if tells else None)

    def _may_leave(self) -> bool:
        return self._closing and not self._unanswered

    def _send(self) -> None:
        with self._changed:
            if not self._d_in:
                return  # closed in the meantime
            envelope, made = self._d_in.popleft()
            self._sending = True
        tensors = self._stream.to_host(dict(envelope.tensors), made)
        try:
            frame = self._link.prepare(dataclasses.replace(envelope, tensors=tensors))
        except (PreflightError, CallCountError) as error:
            # Not one byte was sent. The leader waits for a header: it is told to drain, not left alone.
            self._fail(error)
            with self._changed:
                self._closing = True
                self._d_in.clear()
            return
        header = frame.header
        with self._changed:
            self._expected.sent(header.call_id, header.chunk_index, header.cache_epoch)
            self._unanswered[header.call_id] = time.monotonic()
        self._watch_answers()
        self._link.post(frame)
        with self._changed:
            self._sending = False
            self._changed.notify_all()

    def _take_in(self, arrived: Posted | EngineError) -> None:
        if isinstance(arrived, EngineError):
            raise arrived
        result = self._link.read(arrived)
        if not result.ok:
            raise PeerError(
                f"the mesh leader failed with {result.error_code}: {result.error_message}",
                ids=result.ids(),
                evidence={"peer_code": result.error_code, "peer_message": result.error_message},
            )
        self._link.settle(result.call_id)
        self._expect()
        made = None
        if result.latents_out_BFCHW is not None:
            latents_BFCHW, made = self._stream.to_device(result.latents_out_BFCHW)
            result = dataclasses.replace(result, latents_out_BFCHW=latents_BFCHW)
        with self._changed:
            sent_s = self._unanswered.pop(result.call_id, None)
            # Only an answer that comes twice can find no place, since none is kept for it.
            self._changed.wait_for(lambda: len(self._d_out) < self._pipeline.d_out or self._closing)
            if not self._closing:
                self._d_out.append(Arrival(result, made, time.monotonic(), sent_s))
                self._note_depths()
            self._changed.notify_all()
        self._watch_answers()

    def _beat(self) -> None:
        """NOOP, once the last one is through: a leader that takes none must not fill the memory."""
        budget_s = self._live.watchdog_s
        with self._watchdog.budget("the heartbeat", budget_s, RankExit.TRANSPORT, "FM-41"):
            self._link.settle(self._link.state.last_call_id)
            self._say(Action.NOOP)

    def _say_farewell(self) -> None:
        with self._watchdog.budget("the farewell", self._live.watchdog_s, RankExit.TRANSPORT, "FM-41"):
            if self._farewell is None:
                self._say(Action.SHUTDOWN)
            else:
                self._say(Action.ERROR, meta=error_meta(self._farewell))
            self._link.settle(self._link.state.last_call_id)

    def _say(self, action: Action, **meta: Any) -> None:
        link = self._link
        link.post(prepare_control(action, call_id=link.next_call_id(), link=link.state, **meta))

    def _watch_answers(self) -> None:
        """One answer must come within a phase B, from when it was asked or the one before it came."""
        if self._unanswered:
            budget_s = self._live.phase_budget_s + self._live.watchdog_s
            self._watchdog.arm(A_RESULT, budget_s, RankExit.PHASE_BUDGET, "FM-41")
        else:
            self._watchdog.disarm(A_RESULT)

    def _expect(self) -> None:
        self._room = self._link.expect()
        with self._changed:
            self._arrived = None
        self._posted.put(self._room)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()

    # The thread that waits ---------------------------------------------------------------------------------------

    def _wait_for_rooms(self) -> None:
        """Waits for what the comms thread posted: the backend cannot be asked whether a message is there.

        It uses no group, and says nothing but `arrived`.
        """
        while (posted := self._posted.get()) is not None:
            arrived: Posted | EngineError = posted
            try:
                posted.wait()
            except CommError as error:
                arrived = error
            with self._changed:
                self._arrived = arrived
                self._changed.notify_all()
            if isinstance(arrived, EngineError):
                return
