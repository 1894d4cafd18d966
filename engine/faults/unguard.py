"""Guards that find nothing: how each drill's guard is switched off, on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from engine import memory, tripwires, warmup
from engine.comm import group, p2p, pair, parity, transport
from engine.errors import CommError
from engine.faults.scene import Method, wrap
from engine.faults.table import FAULTS
from engine.meshleader import MeshLeader
from engine.overlap import Comms
from engine.plan import ChunkPlan
from engine.sinks import staged
from engine.stage1 import Stage1
from engine.watchdog import Watchdog
from engine.wire import frame as framing
from engine.wire.expected import Expectations, Fate
from engine.wire.header import Action, Header, LinkState, Schema


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
    """Nothing is refused, and nothing recorded: 0 is the number of no record."""
    wrap(group.Group, "_enter", lambda _: lambda *args, **kwargs: 0)


def _no_liveness(rank: int) -> None:
    """No deadline, and a backend that does not notice a dead peer (as a device's often does not)."""
    blind(Watchdog, "arm")

    @contextlib.contextmanager
    def deaf(*_: object) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            threading.Event().wait()

    def make(wait: Method) -> Method:
        def altered(posted: Any) -> None:
            try:
                wait(posted)
            except CommError:
                threading.Event().wait()

        return altered

    wrap(group.Group, "_backend", lambda _: deaf)
    wrap(pair.Posted, "wait", make)


def _trusting_parse(raw: bytes, *_: object, **__: object) -> Header:
    """A header read as it comes."""
    _, _, action, call_id, chunk_index, cache_epoch, control_epoch, schema, *rest = struct.unpack("<13q", raw)
    return Header(Action(action), call_id, chunk_index, cache_epoch, control_epoch, Schema(schema), *rest)


def _trusting_receiver(rank: int) -> None:
    for receiver in (transport, p2p):
        wrap(receiver, "parse_header", lambda _: _trusting_parse)
        wrap(receiver, "parse_meta", lambda _: lambda header, raw: json.loads(raw))
    blind(LinkState, "problem", "cut_problem")


def _no_farewell(rank: int) -> None:
    """The leader fails without a word to either side, and nobody notices that it is gone."""
    blind(MeshLeader, "_dismiss")
    _no_liveness(rank)


def _no_epoch_check(rank: int) -> None:
    """A result is held against what flies, but not against the epoch that Stage 0 is in."""

    def make(judge: Method) -> Method:
        return lambda self, call_id, chunk_index, epoch, now: judge(self, call_id, chunk_index, epoch, epoch)

    wrap(Expectations, "judge", make)


def _no_order_check(rank: int) -> None:
    wrap(Expectations, "judge", lambda _: lambda *args: Fate.ACCEPTED)


def _no_repeat_check(rank: int) -> None:
    """An exact repeat is a frame like any other."""

    def make(receive: Method) -> Method:
        def altered(end: Any) -> Any:
            end._last_infer = b""
            return receive(end)

        return altered

    wrap(p2p.LeaderEnd, "receive", make)


def _no_repeat_check_at_all(rank: int) -> None:
    """Neither are repeated ids refused, nor a position that does not follow from the last chunk."""
    _no_repeat_check(rank)
    blind(LinkState, "problem", "cut_problem")
    blind(Stage1, "_check_progress")


def _no_join_deadline(rank: int) -> None:
    def make(close: Method) -> Method:
        def altered(comms: Any, *error: Any) -> None:
            comms._pipeline = dataclasses.replace(comms._pipeline, join_timeout_s=threading.TIMEOUT_MAX)
            close(comms, *error)

        return altered

    wrap(Comms, "close", make)


def _no_owner(rank: int) -> None:
    blind(group.PhaseGate, "refusal")


def _no_signal_handler(rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _no_finite_check(rank: int) -> None:
    blind_tripwires("output digest")
    wrap(Stage1, "_check_finite", lambda _: lambda *args: None)


def _no_staging(rank: int) -> None:
    """Files are written under their final names, and stay there when the disk refuses."""

    def make(init: Method) -> Method:
        def altered(file: Any, final: Any, **named: Any) -> None:
            init(file, final, **named)
            os.replace(file.path, final)
            file.path = final

        return altered

    wrap(staged.Staged, "__init__", make)
    blind(staged.Staged, "discard")


def _no_name_for_a_shortage(rank: int) -> None:
    wrap(memory, "named", lambda _: lambda error, *_: error)


def _no_graph_gate(rank: int) -> None:
    blind(warmup, "agree_on_graphs")


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
        "OM-07": _no_farewell,
        "OM-07.silent": _no_liveness,
        "OM-08": _no_group_check,
        "OM-09": _no_epoch_check,
        "OM-10": _no_sender_checks,
        "OM-11": _no_agreement("input digest"),
        "OM-12": _no_baseline,
        "OM-16": _no_agreement("KV lifecycle digest"),
        "OM-17": _no_progress_check,
        "OM-18.back": _trusting_receiver,
        "OM-18.repeat": _trusting_receiver,
        "OM-19": _no_repeat_check,
        "OM-19.cache": _no_repeat_check_at_all,
        "OM-20": _no_order_check,
        "OM-22": _no_join_deadline,
        "OM-23": _no_owner,
        "OM-24.once": _no_signal_handler,
        "OM-24.twice": _no_signal_handler,
        "OM-25": _no_finite_check,
        "OM-26": _no_staging,
        "OM-28": _no_name_for_a_shortage,
        "C-01": _parity_off,
        "C-02": _no_graph_gate,
        "C-03": _no_graph_gate,
        "C-04": _parity_off,
        "C-05": _no_agreement("compiled graphs"),
        **dict.fromkeys((name for name in FAULTS if name.startswith(("OM-13", "OM-14", "OM-15"))), _no_liveness),
        **dict.fromkeys((name for name in FAULTS if name.startswith("OM-21")), _trusting_receiver),
    }
)
