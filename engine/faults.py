"""Drill hooks: every fault that a drill plants, and how its guard is switched off. The only place of both.

Nothing here runs unless the configuration names a drill. The victim breaks by wrapping one method of one of its own
parts (`FAULTS`); without its guard, every rank swaps the guarding function for one that finds nothing (`UNGUARD`).
So the main path has no test flags, and no guard has an off switch in a job that is no drill. The moment of the break
is a commitment point, `inject <id>`, in the victim's black box.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from engine import tripwires
from engine.blackbox import BlackBox
from engine.comm import group, parity, transport
from engine.comm.topology import Groups
from engine.comm.transport import BroadcastLink
from engine.config import DrillConfig, EngineConfig, dotted_keys, parse_text
from engine.errors import ConfigError
from engine.plan import ChunkPlan
from engine.sinks import staged
from engine.stage1 import Stage1
from engine.watchdog import Watchdog
from engine.wire import frame as framing
from engine.wire.envelope import Envelope
from engine.wire.frame import PreparedFrame
from engine.wire.header import Action, Header, LinkState, Schema

if TYPE_CHECKING:  # a generator-only worker never imports the codecs
    from engine.materials import Materials

Method = Callable[..., Any]
DRIFT, DRIFT_LAYER, DRIFT_HEAD = 0.01, 1, 1  # about a hundredth of a key; the head is counted on the victim
CALL = 2  # faults in the middle of phase B come with this generator call of the chunk
FILE_LIMIT_BYTES = 140_000  # room for the raw sink's index and two chunks of the drills' size, not for three


@dataclass
class Scene:
    """The parts of the victim that a fault may touch."""

    drill: DrillConfig
    rank: int
    blackbox: BlackBox
    groups: Groups
    link: BroadcastLink
    stage1: Stage1
    materials: Materials | None

    def inject(self) -> None:
        """Record that the thing is broken now."""
        ids = {**self.groups.gate.ids, "chunk_index": self.drill.at_chunk}
        self.blackbox.commit(mark(self.drill), "-", ids)


def mark(drill: DrillConfig) -> str:
    """The commitment point of the break; black boxes keep 16 bytes."""
    return f"inject {drill.id}"[:16]


def differ(config: EngineConfig, rank: int) -> EngineConfig:
    """The configuration of this rank: the victim of a drill that *is* a difference gets `drill.differs` on top.

    Raises:
        ConfigError: a drill that nobody knows, or a malformed `differs`.
    """
    drill = config.drill
    if not drill.id:
        return config
    if drill.id in AUDITED and drill.without_guard:
        raise ConfigError(f"{drill.id} has no guard to switch off: an audit finds it", code="TP-1013")
    if drill.id not in FAULTS and drill.id not in AUDITED:
        raise ConfigError(f"drill.id: there is no drill '{drill.id}'", code="TP-1013", next_step="tpctl drill --list")
    if not drill.differs or rank != drill.victim_rank:
        return config
    dotted, equals, text = drill.differs.partition("=")
    if not equals:
        raise ConfigError("drill.differs must be section.key=value", code="TP-1013")
    known = dotted_keys()
    if dotted not in known:
        raise ConfigError(f"drill.differs names no key: '{dotted}'", code="TP-1013")
    return config.replace(**{dotted.replace(".", "__"): parse_text(text, known[dotted], dotted, "drill.differs")})


def before_handshake(config: EngineConfig, rank: int, blackbox: BlackBox) -> None:
    """First act of a drill: guards off where asked for, and the mark of a difference that exists from the start."""
    drill = config.drill
    if not drill.id:
        return
    if drill.without_guard:
        UNGUARD[drill.id](rank)
    if rank == drill.victim_rank and drill.differs:
        blackbox.commit(mark(drill), "-", {})


def plant(
    config: EngineConfig,
    rank: int,
    blackbox: BlackBox,
    groups: Groups,
    link: BroadcastLink,
    stage1: Stage1,
    materials: Materials | None,
) -> None:
    """Break this rank, if it is the victim of the drill that the configuration names."""
    drill = config.drill
    if not drill.id:
        return
    scene = Scene(drill, rank, blackbox, groups, link, stage1, materials)
    if drill.debug_collective:
        _debug_collective(scene)
    if rank == drill.victim_rank:
        (FAULTS.get(drill.id) or AUDITED[drill.id])(scene)


def wrap(owner: object, name: str, make: Callable[[Method], Method]) -> None:
    """Put `make(method)` in place of a method; a name that does not exist is an error, so no drill goes stale."""
    setattr(owner, name, make(getattr(owner, name)))


# Where things break -------------------------------------------------------------------------------------------------


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
        calls = 0

        def make(call: Method) -> Method:
            def altered(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if scene.groups.gate.ids["chunk_index"] == scene.drill.at_chunk:
                    calls += 1
                    if calls == CALL:
                        scene.inject()
                        act(scene)
                return call(*args, **kwargs)

            return altered

        wrap(scene.stage1, "_call", make)

    return fault


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

        wrap(scene.link, "send", make)

    return fault


# What breaks --------------------------------------------------------------------------------------------------------


def _plan(envelope: Envelope, **changes: Any) -> Envelope:
    return dataclasses.replace(envelope, plan=dataclasses.replace(envelope.plan, **changes))


def _tensors(envelope: Envelope, **changes: torch.Tensor | None) -> Envelope:
    return dataclasses.replace(envelope, tensors={**envelope.tensors, **changes})


def _held(envelope: Envelope, name: str) -> torch.Tensor:
    tensor = envelope.tensors[name]
    if tensor is None:
        raise ConfigError(f"this drill needs '{name}' in chunk {envelope.plan.chunk_index}", code="TP-1013")
    return tensor


def _nothing(scene: Scene) -> None:
    """The fault is the difference that `differ` planted."""


def _shorter(envelope: Envelope) -> Envelope:
    """One step less, in a plan that agrees with itself."""
    steps = envelope.plan.denoising_step_list[:-1]
    return _plan(
        envelope,
        denoising_step_list=steps,
        num_denoise_steps=len(steps),
        expected_calls=envelope.plan.expected_calls - 1,
    )


def _other_conditioning(scene: Scene, envelope: Envelope) -> Envelope:
    altered_BLD = _held(envelope, "conditioning_embeds").clone()
    altered_BLD[0, 0] += 1.0
    return _tensors(envelope, conditioning_embeds=altered_BLD)


def _other_weight(scene: Scene, envelope: Envelope) -> Envelope:
    weights = dict(scene.stage1.dit.named_parameters())
    name = next(name for name, weight in weights.items() if name.startswith("blocks.1.") and weight.dim() == 2)
    weights[name].data[0] += 0.5
    return envelope


def _emptied_cache(scene: Scene, envelope: Envelope) -> Envelope:
    scene.stage1.kv.reset()
    return envelope


def _nan(scene: Scene) -> None:
    calls = 0

    def make(call: Method) -> Method:
        def altered(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            flow_BFCHW = call(*args, **kwargs)
            if scene.groups.gate.ids["chunk_index"] == scene.drill.at_chunk:
                calls += 1
                if calls == CALL:
                    scene.inject()
                    flow_BFCHW[0, 0, 0, 0, 0] = float("nan")
            return flow_BFCHW

        return altered

    wrap(scene.stage1, "dit", make)


def _drift(scene: Scene) -> None:
    """After generator call `CALL` of the chunk, one head's cached keys are slightly wrong and all indices right."""
    calls = 0

    def make(call: Method) -> Method:
        def altered(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            flow_BFCHW = call(*args, **kwargs)
            if scene.groups.gate.ids["chunk_index"] == scene.drill.at_chunk:
                calls += 1
                if calls == CALL:
                    scene.inject()
                    kv = scene.stage1.kv
                    kv.memory[0][DRIFT_LAYER, :, : kv.local_end_index[DRIFT_LAYER], DRIFT_HEAD] += DRIFT
            return flow_BFCHW

        return altered

    wrap(scene.stage1, "dit", make)


def _stray_broadcast(scene: Scene) -> None:
    scene.groups.world.broadcast(torch.zeros(1))


def _debug_collective(scene: Scene) -> None:
    """What a debug flag does: one more collective, on the ranks that have it."""

    def act(scene: Scene, envelope: Envelope) -> Envelope:
        scene.groups.mesh.barrier()
        return envelope

    received(act)(scene)


def _kill(scene: Scene) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(scene: Scene) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _spin(scene: Scene) -> None:
    """Busy for ever, in Python: other threads of the process still get their turn."""
    while True:
        pass


def _sleep(scene: Scene) -> None:
    threading.Event().wait()


def _hold_the_interpreter(scene: Scene) -> None:
    """In a C call that keeps the interpreter lock: no thread of this process runs Python again."""
    ctypes.PyDLL(None).sleep(86400)


def _terminate(times: int) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)

    return act


def _while_peers_wait(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """On rank 0, while the others wait for a header."""

    def fault(scene: Scene) -> None:
        def change(envelope: Envelope) -> Envelope:
            act(scene)
            return envelope

        prepared(change)(scene)

    return fault


def _kill_after_header(scene: Scene) -> None:
    def forge(frame: PreparedFrame) -> None:
        def make(broadcast: Method) -> Method:
            def last(tensor: torch.Tensor) -> NoReturn:
                broadcast(tensor)
                _kill(scene)
                raise AssertionError

            return last

        wrap(scene.link.group, "broadcast", make)

    on_the_wire(forge)(scene)


def _freeze_in_receive(scene: Scene) -> None:
    def make(receive: Method) -> Method:
        def altered() -> Any:
            if scene.link.state.last_chunk_index == scene.drill.at_chunk - 1:
                scene.inject()
                _freeze(scene)
            return receive()

        return altered

    wrap(scene.link, "receive", make)


def _fill_the_disk(scene: Scene) -> None:
    """The kernel itself refuses: no file of this process may grow past the limit."""

    def change(envelope: Envelope) -> Envelope:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT_BYTES, hard))
        return envelope

    prepared(change)(scene)


def _put(frame: PreparedFrame, name: str, value: bytes) -> None:
    object.__setattr__(frame, name, value)  # a PreparedFrame is frozen, and rightly so


def _reseal(**words: Any) -> Callable[[PreparedFrame], None]:
    """Another header with a checksum of its own: no accident of the line, but a sender that lies."""

    def forge(frame: PreparedFrame) -> None:
        lying = dataclasses.replace(frame.header, **words)
        _put(frame, "header_bytes", dataclasses.replace(lying, meta_checksum=lying.checksum(frame.meta)).pack())

    return forge


def _call_id(step: int) -> Callable[[PreparedFrame], None]:
    def forge(frame: PreparedFrame) -> None:
        _reseal(call_id=frame.header.call_id - 1 - step)(frame)

    return forge


def _flip(byte: int, bit: int = 1) -> Callable[[PreparedFrame], None]:
    def forge(frame: PreparedFrame) -> None:
        raw = bytearray(frame.header_bytes)
        raw[byte] ^= bit
        _put(frame, "header_bytes", bytes(raw))

    return forge


def _truncate(frame: PreparedFrame) -> None:
    """The receiver always reads 104 bytes: what never came reads zero."""
    raw = frame.header_bytes
    _put(frame, "header_bytes", raw[: len(raw) // 2].ljust(len(raw), b"\0"))


def _other_meta(frame: PreparedFrame) -> None:
    """A digit of the seed: still canonical JSON, and a video that looks right."""
    place = frame.meta.index(b'"base_seed":') + len(b'"base_seed":')
    raw = bytearray(frame.meta)
    raw[place] ^= 1
    _put(frame, "meta", bytes(raw))


FAULTS: Mapping[str, Callable[[Scene], None]] = MappingProxyType(
    {
        "OM-01": prepared(lambda e: _plan(e, noise_scale=torch.zeros(1))),
        "OM-02": prepared(lambda e: _tensors(e, conditioning_embeds=_held(e, "conditioning_embeds").bool())),
        "OM-03.plus-one": prepared(lambda e: _plan(e, expected_calls=e.plan.expected_calls + 1)),
        "OM-03.minus-one": prepared(lambda e: _plan(e, expected_calls=e.plan.expected_calls - 1)),
        "OM-03.list": prepared(lambda e: _plan(e, denoising_step_list=e.plan.denoising_step_list[:-1])),
        "OM-03.worker": received(lambda s, e: _plan(e, expected_calls=e.plan.expected_calls + 1)),
        "OM-03.worker-list": received(lambda s, e: _shorter(e)),
        "OM-04": _nothing,
        "OM-05": _nothing,
        "OM-06": in_phase_b(_stray_broadcast),
        "OM-10": prepared(lambda e: _tensors(e, context_frames=None)),
        "OM-11": received(_other_conditioning),
        "OM-12": received(_other_weight),
        "OM-13.idle": _while_peers_wait(_kill),
        "OM-13.header": _kill_after_header,
        "OM-13.phase-b": in_phase_b(_kill),
        "OM-13.lock": _while_peers_wait(_hold_the_interpreter),
        "OM-14": in_phase_b(_kill),
        "OM-15.phase-b": in_phase_b(_freeze),
        "OM-15.receive": _freeze_in_receive,
        "OM-15.idle": _while_peers_wait(_freeze),
        "OM-15.spin": in_phase_b(_spin),
        "OM-15.sleep": in_phase_b(_sleep),
        "OM-15.lock": in_phase_b(_hold_the_interpreter),
        "OM-16": received(_emptied_cache),
        "OM-17": received(lambda s, e: _plan(e, current_start_frame=e.plan.current_start_frame - 1)),
        "OM-18.back": on_the_wire(_call_id(1)),
        "OM-18.repeat": on_the_wire(_call_id(0)),
        "OM-21.magic": on_the_wire(_flip(0)),
        "OM-21.version": on_the_wire(_flip(8, 2)),
        "OM-21.schema": on_the_wire(_reseal(schema_version=2)),
        "OM-21.flip": on_the_wire(_flip(4 * 8, 64)),
        "OM-21.truncated": on_the_wire(_truncate),
        "OM-21.oversized": on_the_wire(_reseal(payload_bytes=1 << 40)),
        "OM-21.meta": on_the_wire(_other_meta),
        "OM-24.once": in_phase_b(_terminate(1)),
        "OM-24.twice": in_phase_b(_terminate(2)),
        "OM-25": _nan,
        "OM-26": _fill_the_disk,
    }
)


# Faults of content that every rank carries on from alike, so that no tripwire sees them: `tpctl kv-audit --deep` does.
AUDITED: Mapping[str, Callable[[Scene], None]] = MappingProxyType({"KV-DRIFT": _drift})


# Guards that find nothing -------------------------------------------------------------------------------------------


def blind(owner: object, *names: str) -> None:
    """These checks find nothing."""
    for name in names:
        wrap(owner, name, lambda _: lambda *args, **kwargs: None)


def blind_tripwires(*checks: str) -> None:
    def make(compare: Method) -> Method:
        return lambda check, *rest: None if check in checks else compare(check, *rest)

    wrap(tripwires, "compare", make)


def _no_sender_checks(rank: int) -> None:
    if rank == 0:
        blind(framing, "find_problem", "meta_problem", "tensors_problem")


def _no_plan_check(rank: int) -> None:
    blind(ChunkPlan, "check")


def _no_agreement(*checks: str) -> Callable[[int], None]:
    return lambda rank: blind_tripwires(*checks)


def _no_progress_check(rank: int) -> None:
    blind(Stage1, "_check_progress")
    blind_tripwires("position", "input digest")


def _no_baseline(rank: int) -> None:
    wrap(tripwires.ShardGuard, "check", lambda _: lambda guard: -1)


def _no_group_check(rank: int) -> None:
    blind(group.Group, "_enter")


def _no_liveness(rank: int) -> None:
    """No deadline, and a backend that does not notice a dead peer (as a device's often does not)."""
    blind(Watchdog, "arm")

    @contextlib.contextmanager
    def deaf(*_: object) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            threading.Event().wait()

    wrap(group.Group, "_backend", lambda _: deaf)


def _trusting_parse(raw: bytes, *_: object, **__: object) -> Header:
    """A header read as it comes."""
    _, _, action, call_id, chunk_index, cache_epoch, control_epoch, schema, *rest = struct.unpack("<13q", raw)
    return Header(Action(action), call_id, chunk_index, cache_epoch, control_epoch, Schema(schema), *rest)


def _trusting_receiver(rank: int) -> None:
    wrap(transport, "parse_header", lambda _: _trusting_parse)
    wrap(transport, "parse_meta", lambda _: lambda header, raw: json.loads(raw))
    blind(LinkState, "problem", "cut_problem")


def _no_signal_handler(rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _no_finite_check(rank: int) -> None:
    blind_tripwires("output digest")
    wrap(Stage1, "_check_finite", lambda _: lambda *args: None)


def _no_staging(rank: int) -> None:
    """Files are written under their final names, and stay there when the disk refuses."""

    def make(init: Method) -> Method:
        def altered(file: Any, final: Any) -> None:
            init(file, final)
            os.replace(file.path, final)
            file.path = final

        return altered

    wrap(staged.Staged, "__init__", make)
    blind(staged.Staged, "discard")


def _parity_off(rank: int) -> None:
    blind(parity, "check")


UNGUARD: Mapping[str, Callable[[int], None]] = MappingProxyType(
    {
        "OM-01": _no_sender_checks,
        "OM-02": _no_sender_checks,
        "OM-03.plus-one": _no_plan_check,
        "OM-03.minus-one": _no_plan_check,
        "OM-03.list": _no_plan_check,
        "OM-03.worker": _no_plan_check,
        "OM-03.worker-list": _no_agreement("call count", "input digest"),
        "OM-04": _parity_off,
        "OM-05": _parity_off,
        "OM-06": _no_group_check,
        "OM-10": _no_sender_checks,
        "OM-11": _no_agreement("input digest"),
        "OM-12": _no_baseline,
        "OM-16": _no_agreement("KV lifecycle digest"),
        "OM-17": _no_progress_check,
        "OM-18.back": _trusting_receiver,
        "OM-18.repeat": _trusting_receiver,
        "OM-24.once": _no_signal_handler,
        "OM-24.twice": _no_signal_handler,
        "OM-25": _no_finite_check,
        "OM-26": _no_staging,
        **dict.fromkeys((name for name in FAULTS if name.startswith(("OM-13", "OM-14", "OM-15"))), _no_liveness),
        **dict.fromkeys((name for name in FAULTS if name.startswith("OM-21")), _trusting_receiver),
    }
)
