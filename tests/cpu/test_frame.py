"""Packing, preparing, control frames, and the golden bytes of the protocol."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine.errors import FrameError, GroupError, PeerError, PreflightError
from engine.plan import V0, V1
from engine.wire.frame import PayloadBuffer, PreparedFrame, check_specs, prepare, prepare_control, rebuild, tensor_specs
from engine.wire.header import Action, Limits, LinkState, Schema, parse_header
from engine.wire.meta import encode_meta, error_meta, parse_meta, peer_error
from tests.cpu.wire_cases import SHAPES, change, link, make, ramp, receive, send

GOLDEN = Path(__file__).parent / "golden"
CONTROL = LinkState(last_call_id=4, last_chunk_index=3, cache_epoch=2, control_epoch=3)
ERROR_META = {"code": "TP-6101", "message": "planned 5, observed 4 – ändrad", "ids": {"call_id": 4, "chunk_index": 3}}


def golden_frames() -> dict[str, bytes]:
    """Each frame as header + meta + payload; tests/cpu/golden holds what they must be for ever under version 1."""
    frames = {
        "infer_v1": send(make(V1)),
        "infer_v1_no_recompute_one_step": send(make(V1, steps=(1000,), recompute=False)),
        "infer_v0": send(make(V0)),
        "noop": prepare_control(Action.NOOP, call_id=5, link=CONTROL),
        "shutdown": prepare_control(Action.SHUTDOWN, call_id=6, link=CONTROL),
        "error": prepare_control(Action.ERROR, call_id=7, link=CONTROL, meta=ERROR_META),
    }
    return {name: _bytes(frame) for name, frame in frames.items()}


def _bytes(frame: PreparedFrame) -> bytes:
    payload = b"" if frame.payload is None else bytes(frame.payload.tolist())
    return frame.header_bytes + frame.meta + payload


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.bin")))
def test_golden_bytes(name):
    assert golden_frames()[name] == (GOLDEN / f"{name}.bin").read_bytes()


def test_every_golden_frame_has_its_file():
    assert set(golden_frames()) == {path.stem for path in GOLDEN.glob("*.bin")}


def test_a_golden_frame_reads_back():
    raw = (GOLDEN / "infer_v1.bin").read_bytes()
    header = parse_header(raw[:104], link(), Limits())
    meta, payload = raw[104 : 104 + header.meta_bytes], raw[104 + header.meta_bytes :]
    envelope = receive(raw[:104], meta, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    assert envelope.plan == make(V1).plan
    assert torch.equal(envelope.tensors["latents"], ramp(1, 3, 2, 2, 2))


def test_tensors_are_sorted_aligned_and_their_gaps_are_zero():
    buffer = PayloadBuffer()
    buffer.view(4096).fill_(0xFF)  # what an earlier frame left behind
    frame = send(make(V1), buffer=buffer)
    specs = tensor_specs(json.loads(frame.meta), frame.header)
    assert [s.key for s in specs] == sorted(s.key for s in specs)
    offset = 0
    for spec in specs:
        assert offset % 16 == 0
        end = offset + spec.nbytes
        offset = end + -end % 16
        assert not frame.payload[end:offset].any(), spec.key
    assert offset == frame.header.payload_bytes == frame.payload.numel()
    assert specs[0].nbytes % 16  # there is a gap to look at


def test_the_buffer_is_reused_and_the_older_frame_turns_stale():
    buffer = PayloadBuffer()
    first = send(make(V1), buffer=buffer)
    where, size = first.payload.data_ptr(), buffer.capacity
    assert not first.stale
    second = send(make(V0), buffer=buffer)
    assert second.payload.data_ptr() == where
    assert buffer.capacity == size
    assert first.stale
    assert not second.stale


def test_rebuilt_tensors_are_views_of_the_payload():
    frame = send(make(V1))
    back = receive(frame.header_bytes, frame.meta, frame.payload)
    start, end = frame.payload.data_ptr(), frame.payload.data_ptr() + frame.payload.numel()
    for tensor in back.tensors.values():
        assert start <= tensor.data_ptr() < end
        assert tensor.is_contiguous()


def test_a_strided_source_is_packed_by_value():
    latents = ramp(1, 3, 2, 2, 4)[..., ::2]
    assert not latents.is_contiguous()
    frame = send(change(make(V1), latents=latents))
    assert torch.equal(receive(frame.header_bytes, frame.meta, frame.payload).tensors["latents"], latents)


def test_preparing_in_inference_mode_leaves_a_buffer_that_works_outside_it():
    buffer = PayloadBuffer()
    with torch.inference_mode():
        send(make(V1), buffer=buffer)
    frame = send(make(V1), buffer=buffer)
    assert torch.equal(receive(frame.header_bytes, frame.meta, frame.payload).tensors["latents"], ramp(1, 3, 2, 2, 2))


def test_a_source_with_a_gradient_does_not_follow_its_bytes():
    frame = send(change(make(V1), latents=ramp(1, 3, 2, 2, 2).requires_grad_()))
    assert not frame.payload.requires_grad


def test_only_prepare_makes_a_prepared_frame():
    frame = send(make(V1))
    with pytest.raises(PreflightError, match="prepare"):
        PreparedFrame(frame.header, frame.header_bytes, frame.meta, frame.payload)
    with pytest.raises(PreflightError, match="prepare"):
        dataclasses.replace(frame, meta=b"{}")
    with pytest.raises(dataclasses.FrozenInstanceError):
        frame.meta = b"{}"


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(max_meta_bytes=100), "meta_bytes"),
        (Limits(max_tensors=4), "tensor_count"),
        (Limits(max_payload_bytes=64), "payload_bytes"),
    ],
)
def test_limits_hold_on_both_sides_before_anything_is_allocated(limits, field):
    buffer = PayloadBuffer()
    with pytest.raises(PreflightError) as caught:
        send(make(V1), limits=limits, buffer=buffer)
    assert caught.value.evidence["field"] == field
    assert buffer.capacity == 0
    with pytest.raises(FrameError) as refused:
        parse_header(send(make(V1)).header_bytes, link(), limits)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("call_id", "changes", "field"),
    [
        (6, {}, "call_id"),
        (5, {}, "call_id"),
        (True, {}, "call_id"),
        (7, {"chunk_index": 4}, "chunk_index"),
        (7, {"cache_epoch": 0}, "cache_epoch"),
        (7, {"cache_epoch": 2}, "cache_epoch"),
        (7, {"cache_epoch": 1.0}, "cache_epoch"),
        (7, {"chunk_index": torch.tensor(3)}, "chunk_index"),
    ],
)
def test_the_sender_holds_its_own_link_rules(call_id, changes, field):
    state = link()
    with pytest.raises(PreflightError) as caught:
        prepare(
            make(V1, **changes), call_id=call_id, link=state, shapes=SHAPES, limits=Limits(), buffer=PayloadBuffer()
        )
    assert caught.value.evidence["field"] == field
    assert state == link()


def test_a_hard_cut_raises_the_epoch():
    cut = {"init_cache": True, "reset_kv_cache": True, "reset_crossattn_cache": True, "current_start_frame": 0}
    frame = send(make(V1, recompute=False, cache_epoch=2, **cut))
    assert receive(frame.header_bytes, frame.meta, frame.payload).plan.init_cache
    with pytest.raises(PreflightError, match="still 1"):
        send(make(V1, recompute=False, **cut))


@pytest.mark.parametrize("action", [Action.NOOP, Action.SHUTDOWN])
def test_control_frames_are_one_message(action):
    frame = prepare_control(action, call_id=5, link=CONTROL)
    assert (len(frame.header_bytes), frame.meta, frame.payload, frame.nbytes) == (104, b"", None, 104)
    header = parse_header(frame.header_bytes, dataclasses.replace(CONTROL), Limits())
    assert (header.action, header.schema, header.chunk_index) == (action, Schema.NONE, -1)
    with pytest.raises(PreflightError, match="carries none"):
        prepare_control(action, call_id=5, link=CONTROL, meta={})


def test_an_error_frame_says_what_died():
    died = GroupError("rank 1: all_reduce on world_pg", ids={"call_id": 3, "chunk_index": 2})
    frame = prepare_control(Action.ERROR, call_id=5, link=CONTROL, meta=error_meta(died, {"rank": 1}))
    header = parse_header(frame.header_bytes, dataclasses.replace(CONTROL), Limits())
    error = peer_error(header, parse_meta(header, frame.meta))
    assert isinstance(error, PeerError)
    assert error.exit_code == 73
    assert error.evidence["peer_code"] == "TP-3101"
    assert error.ids == {"call_id": 3, "chunk_index": 2, "rank": 1}
    assert "all_reduce on world_pg" in error.message


def test_any_exception_can_be_said_as_an_error():
    awkward = ValueError("x" * 100_000 + "\ud800")
    assert len(prepare_control(Action.ERROR, call_id=5, link=CONTROL, meta=error_meta(awkward)).meta) < 5000
    surrogate = error_meta(ValueError("\ud800"))
    assert prepare_control(Action.ERROR, call_id=5, link=CONTROL, meta=surrogate).meta


@pytest.mark.parametrize(
    "meta",
    [None, {}, {"code": "TP-1", "message": "m"}, {"code": 1, "message": "m", "ids": {}},
     {"code": "c", "message": "m", "ids": {"call_id": "x"}}, {"code": "c", "message": "m", "ids": {}, "more": 1}],
)  # fmt: skip
def test_an_incomplete_error_is_refused(meta):
    with pytest.raises(PreflightError):
        prepare_control(Action.ERROR, call_id=5, link=CONTROL, meta=meta)


@pytest.mark.parametrize("action", [Action.INFER, Action.RESULT])
def test_a_chunk_is_no_control_action(action):
    with pytest.raises(PreflightError) as caught:
        prepare_control(action, call_id=5, link=CONTROL)
    assert caught.value.evidence["field"] == "action"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"b":1,"a":1}',
        b'{"a": 1}',
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1e400}',
        b'{"a":1.50}',
        b'{"a":1E2}',
        b'{"a":"\\u0041"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":99999999999999999999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[]",
        b"null",
        b'{"a":1}\n',
        b'\xef\xbb\xbf{"a":1}',
        b"[" * 500_000,
        b'{"a":' + b"[" * 9 + b"]" * 9 + b"}",
        b"\x80\x04K\x01.",
    ],
)
def test_meta_has_one_spelling(raw):
    header = dataclasses.replace(send(make(V1)).header).seal(raw)
    with pytest.raises(FrameError) as caught:
        parse_meta(header, raw)
    assert caught.value.code in ("TP-2202", "TP-2214")


def test_meta_of_the_one_spelling_is_read():
    meta = {"b": [1, 2.5, None, True], "a": {"x": "åäö ✓"}}
    raw = encode_meta(meta)
    assert raw == '{"a":{"x":"åäö ✓"},"b":[1,2.5,null,true]}'.encode()
    assert parse_meta(send(make(V1)).header.seal(raw), raw) == meta


def test_specs_are_checked_before_there_is_a_payload():
    frame = send(make(V1))
    meta = json.loads(frame.meta)
    specs = check_specs(frame.header, meta, shapes=SHAPES, tp_plan=V1)
    assert specs[0].key == "conditioning_embeds"
    back = rebuild(frame.header, meta, frame.payload, shapes=SHAPES, tp_plan=V1, specs=specs)
    assert back.plan == make(V1).plan
    meta["tensor_specs"][0][2] = [1, 5, 3]
    with pytest.raises(FrameError, match="conditioning_embeds"):
        check_specs(frame.header, meta, shapes=SHAPES, tp_plan=V1)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        torch.zeros(16, dtype=torch.uint8),
        torch.zeros(4096, dtype=torch.uint8),
        torch.zeros(10_000, dtype=torch.float32),
    ],
)
def test_a_payload_of_another_size_or_type_is_refused(payload):
    frame = send(make(V1))
    with pytest.raises(FrameError) as caught:
        receive(frame.header_bytes, frame.meta, payload)
    assert caught.value.field == "payload"


def test_an_unaligned_payload_is_refused_by_name():
    frame = send(make(V1))
    room = torch.zeros(frame.payload.numel() + 1, dtype=torch.uint8)
    with pytest.raises(FrameError, match="multiple of 16"):
        rebuild(frame.header, json.loads(frame.meta), room[1:], shapes=SHAPES, tp_plan=V1)


def test_the_step_list_of_the_receiver_comes_from_its_tensor():
    frame = send(make(V1))
    payload = frame.payload.clone()
    specs = tensor_specs(json.loads(frame.meta), frame.header)
    offset = 0
    for spec in specs:
        if spec.key == "denoising_step_list":
            payload[offset : offset + 16].view(torch.int64)[1] = 400
        offset += -(-spec.nbytes // 16) * 16
    assert receive(frame.header_bytes, frame.meta, payload).plan.denoising_step_list == (1000, 400)
