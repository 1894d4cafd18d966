"""What breaks: acts on the victim, and changes of what it holds, sends or has received."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from engine.comm.pair import Posted
from engine.errors import ConfigError
from engine.faults.places import on_the_wire, prepared, received
from engine.faults.scene import Method, Scene, wrap
from engine.wire.envelope import Envelope
from engine.wire.frame import PreparedFrame

DRIFT, DRIFT_LAYER, DRIFT_HEAD = 0.01, 1, 1  # about a hundredth of a key; the head is counted on the victim
SLOW_S = 0.05  # a call; twice as long as one of the tiny model takes
FILE_LIMIT_BYTES = 140_000  # room for the raw sink's index and two chunks of the drills' size, not for three


def replan(envelope: Envelope, **changes: Any) -> Envelope:
    return dataclasses.replace(envelope, plan=dataclasses.replace(envelope.plan, **changes))


def retensor(envelope: Envelope, **changes: torch.Tensor | None) -> Envelope:
    return dataclasses.replace(envelope, tensors={**envelope.tensors, **changes})


def held(envelope: Envelope, name: str) -> torch.Tensor:
    tensor = envelope.tensors[name]
    if tensor is None:
        raise ConfigError(f"this drill needs '{name}' in chunk {envelope.plan.chunk_index}", code="TP-1013")
    return tensor


def nothing(scene: Scene) -> None:
    """The fault was planted at the start: the difference of `differ`, or one of `engine.faults.compiler.EARLY`."""


def shorter(envelope: Envelope) -> Envelope:
    """One step less, in a plan that agrees with itself."""
    steps = envelope.plan.denoising_step_list[:-1]
    return replan(
        envelope,
        denoising_step_list=steps,
        num_denoise_steps=len(steps),
        expected_calls=envelope.plan.expected_calls - 1,
    )


def other_conditioning(scene: Scene, envelope: Envelope) -> Envelope:
    altered_BLD = held(envelope, "conditioning_embeds").clone()
    altered_BLD[0, 0] += 1.0
    return retensor(envelope, conditioning_embeds=altered_BLD)


def other_weight(scene: Scene, envelope: Envelope) -> Envelope:
    weights = dict(scene.stage1.dit.named_parameters())
    name = next(name for name, weight in weights.items() if name.startswith("blocks.1.") and weight.dim() == 2)
    weights[name].data[0] += 0.5
    return envelope


def emptied_cache(scene: Scene, envelope: Envelope) -> Envelope:
    scene.stage1.kv.reset()
    return envelope


def nan(scene: Scene, flow_BFCHW: torch.Tensor) -> None:
    flow_BFCHW[0, 0, 0, 0, 0] = float("nan")


def drift(scene: Scene, flow_BFCHW: torch.Tensor) -> None:
    """One head's cached keys are slightly wrong, and all indices right."""
    kv = scene.stage1.kv
    kv.memory[0][DRIFT_LAYER, :, : kv.local_end_index[DRIFT_LAYER], DRIFT_HEAD] += DRIFT


def slow(scene: Scene) -> None:
    """From the chunk on, every generator call of this rank begins late."""
    gate = scene.groups.gate
    injected = False

    def make(call: Method) -> Method:
        def altered(*args: Any, **kwargs: Any) -> Any:
            nonlocal injected
            if gate.ids.get("chunk_index", -1) >= scene.drill.at_chunk:
                if not injected:
                    injected = True
                    scene.inject()
                time.sleep(SLOW_S)  # the fault itself: nothing waits for it to be over
            return call(*args, **kwargs)

        return altered

    wrap(scene.stage1, "_call", make)


def stray_broadcast(scene: Scene) -> None:
    scene.groups.world.broadcast(torch.zeros(1))


def debug_collective(scene: Scene) -> None:
    """What a debug flag does: one more collective, on the ranks that have it."""

    def act(scene: Scene, envelope: Envelope) -> Envelope:
        scene.groups.mesh.barrier()
        return envelope

    received(act)(scene)


def kill(scene: Scene) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(scene: Scene) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spin(scene: Scene) -> None:
    """Busy for ever, in Python: other threads of the process still get their turn."""
    while True:
        pass


def sleep(scene: Scene) -> None:
    threading.Event().wait()


def hold_the_interpreter(scene: Scene) -> None:
    """In a C call that keeps the interpreter lock: no thread of this process runs Python again."""
    ctypes.PyDLL(None).sleep(86400)


def terminate(times: int) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)

    return act


def kill_after_header(scene: Scene) -> None:
    def forge(frame: PreparedFrame) -> None:
        def make(pass_on: Method) -> Method:
            def last(tensor: torch.Tensor) -> NoReturn:
                passed = pass_on(tensor)
                if isinstance(passed, Posted):
                    passed.wait()
                kill(scene)
                raise AssertionError

            return last

        if scene.parts.pipeline is not None:
            wrap(scene.down.pair.down, "post", make)
        else:
            wrap(scene.link.group, "broadcast", make)

    on_the_wire(forge)(scene)


def freeze_in_receive(scene: Scene) -> None:
    link = scene.link if scene.parts.leader is None else scene.up

    def make(receive: Method) -> Method:
        def altered() -> Any:
            if link.state.last_chunk_index == scene.drill.at_chunk - 1:
                scene.inject()
                freeze(scene)
            return receive()

        return altered

    wrap(link, "receive", make)


def fill_the_disk(scene: Scene) -> None:
    """The kernel itself refuses: no file of this process may grow past the limit."""

    def change(envelope: Envelope) -> Envelope:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, hard))
        return envelope

    prepared(change)(scene)


def put(frame: PreparedFrame, name: str, value: bytes) -> None:
    object.__setattr__(frame, name, value)  # a PreparedFrame is frozen, and rightly so


def reseal(**words: Any) -> Callable[[PreparedFrame], None]:
    """Another header with a checksum of its own: no accident of the line, but a sender that lies."""

    def forge(frame: PreparedFrame) -> None:
        lying = dataclasses.replace(frame.header, **words)
        put(frame, "header_bytes", dataclasses.replace(lying, meta_checksum=lying.checksum(frame.meta)).pack())

    return forge


def call_id(step: int) -> Callable[[PreparedFrame], None]:
    def forge(frame: PreparedFrame) -> None:
        reseal(call_id=frame.header.call_id - 1 - step)(frame)

    return forge


def flip(byte: int, bit: int = 1) -> Callable[[PreparedFrame], None]:
    def forge(frame: PreparedFrame) -> None:
        raw = bytearray(frame.header_bytes)
        raw[byte] ^= bit
        put(frame, "header_bytes", bytes(raw))

    return forge


def truncate(frame: PreparedFrame) -> None:
    """The receiver always reads 104 bytes: what never came reads zero."""
    raw = frame.header_bytes
    put(frame, "header_bytes", raw[: len(raw) // 2].ljust(len(raw), b"\0"))


def other_meta(frame: PreparedFrame) -> None:
    """A digit of the seed: still canonical JSON, and a video that looks right."""
    place = frame.meta.index(b'"base_seed":') + len(b'"base_seed":')
    raw = bytearray(frame.meta)
    raw[place] ^= 1
    put(frame, "meta", bytes(raw))
