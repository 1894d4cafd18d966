"""Where things break: each of these turns a change into a fault that comes at one place of the main path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.faults.scene import Method, Scene, wrap
from engine.wire.envelope import Envelope
from engine.wire.frame import PreparedFrame
from engine.wire.header import Action

CALL = 2  # faults in the middle of phase B come with this generator call of the chunk


def prepared(change: Callable[[Envelope], Envelope]) -> Callable[[Scene], None]:
    """On the sender, between phase A and `prepare`."""

    def fault(scene: Scene) -> None:
        def make(complete: Method) -> Method:
            def altered(envelope: Envelope) -> Envelope:
                whole: Envelope = complete(envelope)
                if whole.plan.chunk_index != scene.drill.at_chunk:
                    return whole
                scene.inject()
                return change(whole)

            return altered

        wrap(scene.materials, "complete", make)

    return fault


def received(change: Callable[[Scene, Envelope], Envelope]) -> Callable[[Scene], None]:
    """On any rank, after receipt and before phase B."""

    def fault(scene: Scene) -> None:
        def make(step: Method) -> Method:
            def altered(envelope: Envelope, *rest: Any) -> Any:
                if envelope.plan.chunk_index == scene.drill.at_chunk:
                    scene.inject()
                    envelope = change(scene, envelope)
                return step(envelope, *rest)

            return altered

        wrap(scene.stage1, "step", make)

    return fault


def in_phase_b(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """Before generator call `CALL` of the chunk."""

    def fault(scene: Scene) -> None:
        def make(call: Method) -> Method:
            due = _counted(scene)

            def altered(*args: Any, **kwargs: Any) -> Any:
                if due():
                    act(scene)
                return call(*args, **kwargs)

            return altered

        wrap(scene.stage1, "_call", make)

    return fault


def after_call(act: Callable[[Scene, Any], None]) -> Callable[[Scene], None]:
    """After generator call `CALL` of the chunk; `act` gets the flow that it made, [B, F, C, H, W]."""

    def fault(scene: Scene) -> None:
        def make(call: Method) -> Method:
            due = _counted(scene)

            def altered(*args: Any, **kwargs: Any) -> Any:
                flow_BFCHW = call(*args, **kwargs)
                if due():
                    act(scene, flow_BFCHW)
                return flow_BFCHW

            return altered

        wrap(scene.stage1, "dit", make)

    return fault


def _counted(scene: Scene) -> Callable[[], bool]:
    """True once: at generator call `CALL` of the chunk, which is marked."""
    calls = 0

    def due() -> bool:
        nonlocal calls
        if scene.groups.gate.ids["chunk_index"] != scene.drill.at_chunk:
            return False
        calls += 1
        if calls == CALL:
            scene.inject()
        return calls == CALL

    return due


def on_the_wire(forge: Callable[[PreparedFrame], None]) -> Callable[[Scene], None]:
    """On the sender, after every check of `prepare`: only the bytes change."""

    def fault(scene: Scene) -> None:
        def make(send: Method) -> Method:
            def altered(frame: PreparedFrame) -> None:
                if frame.header.action is Action.INFER and frame.header.chunk_index == scene.drill.at_chunk:
                    scene.inject()
                    forge(frame)
                send(frame)

            return altered

        if scene.parts.pipeline is not None:
            wrap(scene.down, "post", make)
        else:
            wrap(scene.link, "send", make)

    return fault


def while_peers_wait(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """On rank 0, while the others wait for a header."""

    def fault(scene: Scene) -> None:
        def change(envelope: Envelope) -> Envelope:
            act(scene)
            return envelope

        prepared(change)(scene)

    return fault
