"""The pp wire: names of the other dialect, results, and the refusals by name that only this wire has."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import FrameError, PreflightError
from engine.plan import PP0, PP1
from engine.wire.dialect import META_NAMES, PP, PP_V2V, TENSOR_NAMES, TP, Dialect, pp_wire
from engine.wire.envelope import Envelope, Shapes, envelope_meta
from engine.wire.frame import (
    PayloadBuffer,
    PreparedFrame,
    check_result,
    prepare,
    prepare_result,
    rebuild,
    rebuild_result,
)
from engine.wire.header import HEADER_BYTES, Action, Header, Limits, LinkState, Schema, parse_header
from engine.wire.meta import parse_meta
from engine.wire.result import Result
from tests.cpu.wire_cases import SHAPES, change, forge, link, make, ramp

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
DOWN = {"accept": frozenset({Action.INFER}), "schemas": {Schema.PP_ENVELOPE: 1}}
UP = {"accept": frozenset({Action.RESULT}), "schemas": {Schema.PP_RESULT: 1}}
GOOD = Result(
    call_id=7,
    chunk_index=3,
    cache_epoch=1,
    control_epoch=0,
    ok=True,
    error_code=None,
    error_message=None,
    observed_generator_calls=3,
    mesh_current_start_frame=12,
    output_digest_i64=-5,
    t_b_ms=12.5,
    t_mesh_idle_ms=0.25,
    latents_out_BFCHW=ramp(1, 3, 2, 2, 2),
)
BAD = Result.failed(GOOD.ids(), 0, "TP-6001", "no lück")


def send(envelope: Envelope, wire: Dialect = PP) -> PreparedFrame:
    buffer = PayloadBuffer()
    return prepare(envelope, call_id=7, link=link(), shapes=SHAPES, limits=Limits(), buffer=buffer, wire=wire)


def receive(
    header_bytes: bytes, meta: bytes, payload: torch.Tensor | None, tp_plan: str = PP1, wire: Dialect = PP
) -> Envelope:
    state = link()
    header = parse_header(header_bytes, state, Limits(), **DOWN | {"schemas": {Schema.PP_ENVELOPE: wire.version}})
    return rebuild(header, parse_meta(header, meta), payload, shapes=SHAPES, tp_plan=tp_plan, link=state, wire=wire)


def answer(result: Result) -> PreparedFrame:
    return prepare_result(result, link=link(), shapes=SHAPES, limits=Limits(), buffer=PayloadBuffer())


def hear(header_bytes: bytes, meta: bytes, payload: torch.Tensor | None) -> Result:
    header = parse_header(header_bytes, link(), Limits(), **UP)
    parsed = parse_meta(header, meta)
    return rebuild_result(header, parsed, payload, shapes=SHAPES, specs=check_result(header, parsed, shapes=SHAPES))


def altered(frame: PreparedFrame, part: str, **changes: object) -> tuple[bytes, bytes, torch.Tensor | None]:
    """What a sender without preflight would send: `...` removes a key."""
    meta = json.loads(frame.meta)
    meta[part] = {key: value for key, value in {**meta[part], **changes}.items() if value is not ...}
    return *forge(frame, meta), frame.payload


def test_the_two_wires_name_every_value_and_share_no_schema():
    assert set(PP.meta) == set(TP.meta) == {name.attribute for name in META_NAMES}
    assert set(PP.tensor) == set(TP.tensor) == set(TENSOR_NAMES)
    for wire in (TP, PP):
        assert len(set(wire.meta.values())) == len(META_NAMES)
        assert len(set(wire.tensor.values())) == len(TENSOR_NAMES)
    assert PP.schema is not TP.schema


def test_the_names_of_the_contract():
    meta = json.loads(send(make(PP1)).meta)
    assert set(meta["envelope"]) == {
        "pp_envelope_version", "pp_disable_vace", "height", "width", "current_start_frame", "init_cache",
        "reset_kv_cache", "reset_crossattn_cache", "conditioning_embeds_updated", "kv_cache_attention_bias",
        "do_kv_recompute", "num_denoise_steps", "expected_generator_calls", "base_seed", "noise_scale", "clean_pass",
    }  # fmt: skip
    assert [row[0] for row in meta["tensor_specs"]] == [
        "conditioning_embeds", "context_frames", "current_denoising_step_list", "latents_in", "renoise",
    ]  # fmt: skip
    assert envelope_meta(make(PP1, recompute=False), PP)["context_frames"] is None


@pytest.mark.parametrize("tp_plan", [PP0, PP1])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("steps", [(1000,), (1000, 750, 500, 250)])
def test_round_trip(tp_plan, recompute, steps):
    envelope = make(tp_plan, steps=steps, recompute=recompute)
    frame = send(envelope)
    back = receive(frame.header_bytes, frame.meta, frame.payload, tp_plan)
    assert (back.tp_plan, back.plan, set(back.tensors)) == (tp_plan, envelope.plan, set(envelope.tensors))
    for name, tensor in envelope.tensors.items():
        assert back.tensors[name] is None if tensor is None else torch.equal(back.tensors[name], tensor)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pp_disable_vace": False}, "pp_disable_vace"),
        ({"pp_disable_vace": ...}, "pp_disable_vace"),
        ({"pp_disable_vace": 1}, "pp_disable_vace"),
        ({"noise_scale": 0.5}, "noise_scale"),
        ({"vace_context_scale": 1.0}, "vace_context_scale"),
        ({"tp_plan": PP1}, "tp_plan"),
        ({"pp_envelope_version": 2}, "pp_envelope_version"),
        ({"tp_do_kv_recompute": True}, "tp_do_kv_recompute"),
        ({"context_frames": None}, "context_frames"),
        ({"base_seed": ...}, "base_seed"),
    ],
)
def test_the_receiver_refuses_by_name(changes, field):
    with pytest.raises(FrameError) as caught:
        receive(*altered(send(make(PP1)), "envelope", **changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("envelope", "field"),
    [
        (dataclasses.replace(make(PP1), plan=dataclasses.replace(make(PP1).plan, noise_scale=0.7)), "noise_scale"),
        (change(make(PP1), video=ramp(1, 3)), "video"),
        (change(make(PP1), vace_frames=ramp(1, 3)), "vace_frames"),
        (change(make(PP1), latents=None), "latents"),
        (dataclasses.replace(make(PP1), prompt="a fox"), "prompt"),
        (change(make(PP1), latents=ramp(1, 3, 2, 2, 4)), "latents"),
    ],
)
def test_the_sender_refuses_by_name(envelope, field):
    with pytest.raises(PreflightError) as caught:
        send(envelope)
    assert caught.value.evidence["field"] == field


def test_a_tp_frame_is_refused_on_the_pp_wire():
    buffer = PayloadBuffer()
    frame = prepare(make(PP1), call_id=7, link=link(), shapes=SHAPES, limits=Limits(), buffer=buffer)
    with pytest.raises(FrameError) as caught:
        receive(frame.header_bytes, frame.meta, frame.payload)
    assert caught.value.field == "schema"


@pytest.mark.parametrize("result", [GOOD, BAD], ids=["ok", "error"])
def test_a_result_round_trips(result):
    frame = answer(result)
    assert (frame.payload is None) == (not result.ok)
    back = hear(frame.header_bytes, frame.meta, frame.payload)
    latents_BFCHW = back.latents_out_BFCHW
    assert dataclasses.replace(back, latents_out_BFCHW=None) == dataclasses.replace(result, latents_out_BFCHW=None)
    if result.ok:
        assert torch.equal(latents_BFCHW, result.latents_out_BFCHW)
    else:
        assert latents_BFCHW is None


def test_an_error_result_takes_any_ids_and_any_words():
    failed = Result.failed({"call_id": 1 << 60, "chunk_index": -1, "cache_epoch": 9}, 3, "TP-2203", "\ud800" * 9000)
    state = LinkState(last_call_id=1 << 61)
    frame = prepare_result(failed, link=state, shapes=SHAPES, limits=Limits(), buffer=PayloadBuffer())
    assert frame.header.ids() == failed.ids()
    assert len(json.loads(frame.meta)["result"]["error_message"]) == 4096


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ok": False}, "error_code"),
        ({"error_code": "TP-1"}, "error_code"),
        ({"ok": 1}, "ok"),
        ({"t_b_ms": -1.0}, "t_b_ms"),
        ({"observed_generator_calls": 3.0}, "observed_generator_calls"),
        ({"pp_result_version": 2}, "pp_result_version"),
        ({"output_digest_i64": ...}, "output_digest_i64"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_result_that_breaks_its_schema_is_refused_by_name(changes, field):
    with pytest.raises(FrameError) as caught:
        hear(*altered(answer(GOOD), "result", **changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (dataclasses.replace(GOOD, latents_out_BFCHW=ramp(1, 3, 2, 2, 4)), "TP-2118"),
        (dataclasses.replace(GOOD, latents_out_BFCHW=ramp(1, 3, 2, 2, 2).float()), "TP-2119"),
        (dataclasses.replace(GOOD, latents_out_BFCHW=None), "TP-2116"),
        (dataclasses.replace(BAD, latents_out_BFCHW=ramp(1, 3, 2, 2, 2)), "TP-2117"),
        (dataclasses.replace(GOOD, t_b_ms=float("nan")), "TP-2102"),
        (dataclasses.replace(GOOD, chunk_index=4), "TP-2107"),
    ],
)
def test_a_wrong_result_is_never_sent(result, code):
    with pytest.raises(PreflightError) as caught:
        answer(result)
    assert caught.value.code == code


def test_a_result_of_the_wrong_shape_is_refused_before_its_payload_is_read():
    other = dataclasses.replace(SHAPES, latent_w=4)
    wide = dataclasses.replace(GOOD, latents_out_BFCHW=ramp(1, 3, 2, 2, 4))
    frame = prepare_result(wide, link=link(), shapes=other, limits=Limits(), buffer=PayloadBuffer())
    header = parse_header(frame.header_bytes, link(), Limits(), **UP)
    with pytest.raises(FrameError, match=r"latents_out: shape \[1, 3, 2, 2, 4\], expected \[1, 3, 2, 2, 2\]"):
        check_result(header, parse_meta(header, frame.meta), shapes=SHAPES)


@pytest.mark.parametrize("frame", [send(make(PP1)), answer(GOOD), answer(BAD)], ids=["envelope", "ok", "error"])
def test_every_single_bit_of_header_and_meta_matters(frame):
    good = frame.header_bytes + frame.meta
    read = receive if frame.header.action is Action.INFER else hear
    read(frame.header_bytes, frame.meta, frame.payload)
    for bit in range(0, len(good) * 8, 7):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            read(bytes(bad[:HEADER_BYTES]), bytes(bad[HEADER_BYTES:]), frame.payload)


@QUICK
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_results_of_any_size_round_trip(frames, channels, side, dtype):
    shapes = Shapes(frames, 3, channels, side, side, 3, 5, dtype)
    latents_BFCHW = torch.randn(shapes.latents()[0], generator=torch.Generator().manual_seed(1))
    latents_BFCHW = latents_BFCHW.to(getattr(torch, dtype))
    result = dataclasses.replace(GOOD, latents_out_BFCHW=latents_BFCHW)
    frame = prepare_result(result, link=link(), shapes=shapes, limits=Limits(), buffer=PayloadBuffer())
    header: Header = parse_header(frame.header_bytes, link(), Limits(), **UP)
    meta = parse_meta(header, frame.meta)
    specs = check_result(header, meta, shapes=shapes)
    back = rebuild_result(header, meta, frame.payload.clone(), shapes=shapes, specs=specs)
    assert torch.equal(back.latents_out_BFCHW, latents_BFCHW)


V2V = dataclasses.replace(make(PP1), plan=dataclasses.replace(make(PP1).plan, noise_scale=1.0))


def test_video_to_video_has_a_version_of_its_own():
    frame = send(V2V, PP_V2V)
    assert receive(frame.header_bytes, frame.meta, frame.payload, wire=PP_V2V).plan == V2V.plan
    assert json.loads(frame.meta)["envelope"]["pp_envelope_version"] == 2
    for sent, spoken in ((send(V2V, PP_V2V), PP), (send(make(PP1)), PP_V2V)):  # neither party takes the other's
        with pytest.raises(FrameError) as caught:
            receive(sent.header_bytes, sent.meta, sent.payload, wire=spoken)
        assert caught.value.field == "schema_version"
    for scale in (0.0, 1.5, True, "1"):
        wrong = altered(send(V2V, PP_V2V), "envelope", noise_scale=scale)
        with pytest.raises(FrameError) as caught:
            receive(*wrong, wire=PP_V2V)
        assert caught.value.field == "noise_scale"
    assert (pp_wire(None), pp_wire(0.7)) == (PP, PP_V2V)


GOLDEN = Path(__file__).parent / "golden" / "pp"
FRAMES = {
    "infer": send(make(PP1)),
    "infer_v2_video_to_video": send(V2V, PP_V2V),
    "infer_no_recompute_one_step": send(make(PP1, steps=(1000,), recompute=False)),
    "result": answer(GOOD),
    "result_error": answer(BAD),
}


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_golden_bytes(name):
    """What these frames must be for ever under their versions."""
    frame = FRAMES[name]
    payload = b"" if frame.payload is None else bytes(frame.payload.tolist())
    assert frame.header_bytes + frame.meta + payload == (GOLDEN / f"{name}.bin").read_bytes()
