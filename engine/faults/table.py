"""The faults by drill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from engine.faults.acts import (
    call_id,
    drift,
    emptied_cache,
    fill_the_disk,
    flip,
    freeze,
    freeze_in_receive,
    held,
    hold_the_interpreter,
    kill,
    kill_after_header,
    nan,
    nothing,
    other_conditioning,
    other_meta,
    other_weight,
    replan,
    reseal,
    retensor,
    shorter,
    sleep,
    slow,
    spin,
    stray_broadcast,
    terminate,
    truncate,
)
from engine.faults.codecs import full_worker
from engine.faults.compiler import compiles_anew
from engine.faults.memory import exhaust
from engine.faults.places import after_call, in_phase_b, on_the_wire, prepared, received, while_peers_wait
from engine.faults.pplink import (
    astray_in_phase_b,
    late_answer,
    reordered,
    second_caller,
    send_after_decode,
    sent_twice,
    spoiled_after_receipt,
    stuck_in_a_receive,
    swallowed,
)
from engine.faults.scene import Scene

FAULTS: Mapping[str, Callable[[Scene], None]] = MappingProxyType(
    {
        "OM-01": prepared(lambda e: replan(e, noise_scale=torch.zeros(1))),
        "OM-02": prepared(lambda e: retensor(e, conditioning_embeds=held(e, "conditioning_embeds").bool())),
        "OM-03.plus-one": prepared(lambda e: replan(e, expected_calls=e.plan.expected_calls + 1)),
        "OM-03.minus-one": prepared(lambda e: replan(e, expected_calls=e.plan.expected_calls - 1)),
        "OM-03.list": prepared(lambda e: replan(e, denoising_step_list=e.plan.denoising_step_list[:-1])),
        "OM-03.worker": received(lambda s, e: replan(e, expected_calls=e.plan.expected_calls + 1)),
        "OM-03.worker-list": received(lambda s, e: shorter(e)),
        "OM-04": nothing,
        "OM-05": nothing,
        "OM-06": in_phase_b(stray_broadcast),
        "OM-07": spoiled_after_receipt,
        "OM-07.silent": swallowed,
        "OM-08": astray_in_phase_b,
        "OM-09": late_answer,
        "OM-10": prepared(lambda e: retensor(e, context_frames=None)),
        "OM-11": received(other_conditioning),
        "OM-12": received(other_weight),
        "OM-13.idle": while_peers_wait(kill),
        "OM-13.header": kill_after_header,
        "OM-13.phase-b": in_phase_b(kill),
        "OM-13.lock": while_peers_wait(hold_the_interpreter),
        "OM-14": in_phase_b(kill),
        "OM-15.phase-b": in_phase_b(freeze),
        "OM-15.receive": freeze_in_receive,
        "OM-15.idle": while_peers_wait(freeze),
        "OM-15.spin": in_phase_b(spin),
        "OM-15.sleep": in_phase_b(sleep),
        "OM-15.lock": in_phase_b(hold_the_interpreter),
        "OM-16": received(emptied_cache),
        "OM-17": received(lambda s, e: replan(e, current_start_frame=e.plan.current_start_frame - 1)),
        "OM-18.back": on_the_wire(call_id(1)),
        "OM-18.repeat": on_the_wire(call_id(0)),
        "OM-19": sent_twice,
        "OM-19.cache": sent_twice,
        "OM-20": reordered,
        "OM-21.magic": on_the_wire(flip(0)),
        "OM-21.version": on_the_wire(flip(8, 2)),
        "OM-21.schema": on_the_wire(reseal(schema_version=2)),
        "OM-21.flip": on_the_wire(flip(4 * 8, 64)),
        "OM-21.truncated": on_the_wire(truncate),
        "OM-21.oversized": on_the_wire(reseal(payload_bytes=1 << 40)),
        "OM-21.meta": on_the_wire(other_meta),
        "OM-22": stuck_in_a_receive,
        "OM-23": second_caller,
        "OM-24.once": in_phase_b(terminate(1)),
        "OM-24.twice": in_phase_b(terminate(2)),
        "OM-25": after_call(nan),
        "OM-26": fill_the_disk,
        "OM-28": in_phase_b(exhaust),
        **dict.fromkeys(("C-01", "C-02", "C-03", "C-04"), nothing),
        "C-05": compiles_anew,
    }
)


# Faults that no tripwire sees, and no job dies of. Of content, which every rank carries on from alike: `tpctl kv-audit
# --deep` finds it. Of time alone, or of memory: bring-up and `tpctl timeline` find it in the records
# (`engine.measures`) and in the reports.
AUDITED: Mapping[str, Callable[[Scene], None]] = MappingProxyType(
    {
        "KV-DRIFT": after_call(drift),
        "O-02": send_after_decode,
        "SLOW-RANK": slow,
        "P0-WARM-UP": full_worker,
    }
)
