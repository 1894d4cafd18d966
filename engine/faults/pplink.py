"""What breaks on the pp link and around it: answers late or in another order, an envelope twice, a second caller."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from engine.comm.group import Phase
from engine.comm.p2p import FIRST_BYTES, messages
from engine.comm.pair import Posted
from engine.comm.transport import Received
from engine.errors import GroupError
from engine.faults.acts import held, retensor
from engine.faults.scene import Method, Scene, wrap
from engine.wire.frame import PreparedFrame
from engine.wire.header import Header, LinkState
from engine.wire.problem import Problem
from engine.wire.result import Result


def spoiled_after_receipt(scene: Scene) -> None:
    """On the leader: the envelope came whole and was accepted, and then lost a token of its conditioning."""

    def make(receive: Method) -> Method:
        def altered() -> Received | None:
            received: Received | None = receive()
            if received is None or received.envelope is None or received.header.chunk_index != scene.drill.at_chunk:
                return received
            scene.inject()
            whole_BLD = held(received.envelope, "conditioning_embeds")
            return dataclasses.replace(
                received, envelope=retensor(received.envelope, conditioning_embeds=whole_BLD[:, 1:].contiguous())
            )

        return altered

    wrap(scene.up, "receive", make)


def swallowed(scene: Scene) -> None:
    """On the leader: an envelope that it takes, and neither serves nor answers."""

    def make(receive: Method) -> Method:
        def altered() -> Received | None:
            received: Received | None = receive()
            if received is not None and received.header.chunk_index == scene.drill.at_chunk:
                scene.inject()
                received = receive()
            return received

        return altered

    wrap(scene.up, "receive", make)


def send_after_decode(scene: Scene) -> None:
    """On Stage 0, from the chunk on: phase A waits until nothing is under way and the last result is decoded."""
    pipeline = scene.pipeline
    planted = False

    def make(may_feed: Method) -> Method:
        def altered() -> bool:
            nonlocal planted
            if pipeline.stage0.chunk_index < scene.drill.at_chunk:
                return bool(may_feed())
            if not planted:
                planted = True
                scene.inject()
            return not pipeline._emitting and not pipeline._flying and bool(may_feed())

        return altered

    wrap(pipeline, "_may_feed", make)


def astray_in_phase_b(scene: Scene) -> None:
    """The generator's own reduction, once, on the group of all ranks instead of the mesh's."""
    done = False

    def make(all_reduce: Method) -> Method:
        def altered(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal done
            gate = scene.groups.gate
            if done or gate.phase is not Phase.B or gate.ids.get("chunk_index") != scene.drill.at_chunk:
                return all_reduce(tensor)  # type: ignore[no-any-return]
            done = True
            scene.inject()
            return scene.groups.world.all_reduce(tensor)

        return altered

    wrap(scene.groups.mesh, "all_reduce", make)


def _await_next(scene: Scene) -> None:
    """The leader takes the next frame's first message before it goes on; its next `receive` finds it there."""
    up = scene.up
    came = up._receive(up._first)

    def make(receive: Method) -> Method:
        def altered(room: torch.Tensor) -> torch.Tensor:
            if room is came and receiving:
                receiving.clear()
                return came
            return receive(room)  # type: ignore[no-any-return]

        return altered

    receiving = [True]
    wrap(up, "_receive", make)


def late_answer(scene: Scene) -> None:
    """On the leader: an answer that stays until the envelope after it has come."""

    def make(answer: Method) -> Method:
        def altered(result: Result) -> None:
            if result.chunk_index == scene.drill.at_chunk:
                scene.inject()
                _await_next(scene)
            answer(result)

        return altered

    wrap(scene.up, "answer", make)


class _Unordered(LinkState):
    """A leader that does not hold its answers against each other."""

    def problem(self, header: Header) -> Problem | None:
        return None


def reordered(scene: Scene) -> None:
    """On the leader: an answer that comes after the one behind it."""
    scene.up._answers = _Unordered()
    kept: list[Result] = []

    def make(answer: Method) -> Method:
        def altered(result: Result) -> None:
            if result.chunk_index == scene.drill.at_chunk:
                kept.append(result)
                return
            if kept:
                scene.inject()
            answer(result)
            if kept:
                answer(kept.pop())

        return altered

    wrap(scene.up, "answer", make)


def sent_twice(scene: Scene) -> None:
    """On Stage 0: every byte of an envelope goes out once more, right behind the first time."""
    down = scene.down
    again: list[Posted] = []

    def make(post: Method) -> Method:
        def altered(frame: PreparedFrame) -> None:
            post(frame)
            if frame.header.chunk_index == scene.drill.at_chunk:
                scene.inject()
                again.extend(down.pair.down.post(message.clone()) for message in messages(frame))

        return altered

    wrap(down, "post", make)


def stuck_in_a_receive(scene: Scene) -> None:
    """The comms thread of Stage 0 waits for a message that nobody sends, when it ought to say SHUTDOWN."""

    def make(_: Method) -> Method:
        def altered() -> None:
            scene.inject()
            scene.down.pair.up.post(torch.zeros(1, dtype=torch.uint8)).wait()

        return altered

    wrap(scene.comms, "_say_farewell", make)


def second_caller(scene: Scene) -> None:
    """On Stage 0, while chunks are under way: phase A sends something of its own."""
    sent: list[Posted] = []

    def make(complete: Method) -> Method:
        def altered(envelope: Any) -> Any:
            if envelope.plan.chunk_index == scene.drill.at_chunk:
                scene.inject()
                try:
                    sent.append(scene.down.pair.down.post(torch.zeros(FIRST_BYTES, dtype=torch.uint8)))
                except GroupError as error:
                    scene.blackbox.commit(f"refused {error.code}", scene.down.pair.down.name, envelope.plan.ids())
            return complete(envelope)

        return altered

    wrap(scene.materials, "complete", make)
