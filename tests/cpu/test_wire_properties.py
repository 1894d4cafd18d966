"""No frame that was mutated, truncated or extended is accepted, and none makes the receiver ask for more than it may.

Payload bytes are outside the frame's checksum on purpose: the input digest (contract, section 9) covers them, over
every rank at once. What holds here is their number and where each tensor lies.
"""

import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CallCountError, EngineError, FrameError
from engine.plan import V1
from engine.wire.envelope import Shapes
from engine.wire.frame import PayloadBuffer, check_specs, prepare, rebuild
from engine.wire.header import HEADER_BYTES, Limits, LinkState, parse_header
from engine.wire.meta import encode_meta, find_problem, parse_meta
from tests.cpu.wire_cases import PLANS, SHAPES, forge, link, make, receive, send

QUICK = settings(max_examples=200, deadline=None, derandomize=True)
LIMITS = Limits(max_meta_bytes=4096, max_tensors=8, max_payload_bytes=1 << 16)
FRAME = send(make(V1))
SIZE = HEADER_BYTES + len(FRAME.meta)

plain = st.recursive(
    st.none()
    | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz_", max_size=4), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


class Wire:
    """The three messages as a byte stream with an end; it counts what the receiver asks room for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, []

    def read(self, nbytes: int) -> bytes:
        self.asked.append(nbytes)
        got, self.data = self.data[:nbytes], self.data[nbytes:]
        return got


def take(wire: Wire, tp_plan: str = V1):
    """The receiver over a stream: room for meta and payload is asked for only where a transport would."""
    state = link()
    header = parse_header(wire.read(HEADER_BYTES), state, LIMITS)
    raw = wire.read(header.meta_bytes)
    meta = parse_meta(header, raw)
    check_specs(header, meta, shapes=SHAPES, tp_plan=tp_plan, link=state)
    body = wire.read(header.payload_bytes)
    payload = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else None
    envelope = receive(header.pack(), raw, payload, tp_plan)
    if wire.data:
        raise FrameError("bytes are left over", field="payload")
    return envelope


def stream(frame=FRAME) -> bytes:
    return frame.header_bytes + frame.meta + bytes(frame.payload.tolist())


def within_limits(wire: Wire) -> bool:
    asked = [*wire.asked, 0, 0]
    return asked[0] == HEADER_BYTES and asked[1] <= LIMITS.max_meta_bytes and asked[2] <= LIMITS.max_payload_bytes


def test_the_unharmed_frame_is_accepted():
    assert take(Wire(stream())).plan == make(V1).plan


def test_every_single_bit_of_header_and_meta_matters():
    good = stream()
    for bit in range(SIZE * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        wire = Wire(bytes(bad))
        with pytest.raises(FrameError):
            take(wire)
        assert within_limits(wire)


@QUICK
@given(
    st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 255)), min_size=2, max_size=12, unique_by=lambda x: x[0]
    )
)
def test_many_changed_bytes(changes):
    bad = bytearray(stream())
    for place, mask in changes:
        bad[place] ^= mask
    wire = Wire(bytes(bad))
    with pytest.raises(FrameError):
        take(wire)
    assert within_limits(wire)


@QUICK
@given(st.integers(0, len(stream()) - 1))
def test_truncated(size):
    wire = Wire(stream()[:size])
    with pytest.raises(FrameError):
        take(wire)
    assert within_limits(wire)


@QUICK
@given(st.binary(min_size=1, max_size=64), st.integers(0, len(stream())))
def test_extended_or_with_bytes_slipped_in(extra, place):
    good = stream()
    bad = good[:place] + extra + good[place:]
    wire = Wire(bad)
    try:
        envelope = take(wire)
    except FrameError:
        pass
    else:  # bytes slipped into the payload shift it out of its size, so it cannot get here
        pytest.fail(f"accepted {envelope.plan}")
    assert within_limits(wire)


@QUICK
@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=13, max_size=13), st.integers(0, 13))
def test_arbitrary_words_after_a_good_start(words, kept):
    good = struct.unpack("<13q", FRAME.header_bytes)
    mixed = [*good[:kept], *words[kept:]]
    wire = Wire(struct.pack("<13q", *mixed) + FRAME.meta + bytes(FRAME.payload.tolist()))
    if mixed == list(good):
        assert take(wire).plan == make(V1).plan
    else:
        with pytest.raises(FrameError):
            take(wire)
    assert within_limits(wire)


KEYS = sorted(json.loads(FRAME.meta)["envelope"])


@QUICK
@given(st.sampled_from([*KEYS, "video", "prompt", "latents"]), plain)
def test_a_meta_value_replaced_under_a_good_checksum_is_refused_or_is_that_very_plan(key, value):
    meta = json.loads(FRAME.meta)
    meta["envelope"][key] = value
    header, raw = forge(FRAME, meta)
    wire = Wire(header + raw + bytes(FRAME.payload.tolist()))
    try:
        envelope = take(wire)
    except (FrameError, CallCountError):
        pass
    else:  # a legal value for this key: it must have arrived as it was sent
        assert encode_meta(meta) == raw
        assert envelope.plan.check(7) is None
        assert set(json.loads(raw)["envelope"]) == set(KEYS)
    assert within_limits(wire)


@QUICK
@given(st.integers(0, 4), st.sampled_from([0, 1, 2, 3]), plain)
def test_a_spec_replaced_under_a_good_checksum(row, column, value):
    meta = json.loads(FRAME.meta)
    before = meta["tensor_specs"][row][column]
    meta["tensor_specs"][row][column] = value
    header, raw = forge(FRAME, meta)
    wire = Wire(header + raw + bytes(FRAME.payload.tolist()))
    if type(value) is type(before) and value == before:
        assert take(wire).plan == make(V1).plan
    else:
        with pytest.raises((FrameError, CallCountError)):
            take(wire)
    assert len(wire.asked) <= 2 or wire.asked[2] == FRAME.header.payload_bytes


@QUICK
@given(st.dictionaries(st.text("abc_", max_size=3), plain, max_size=4))
def test_meta_round_trips_in_one_spelling(meta):
    raw = encode_meta(meta)
    header = FRAME.header.seal(raw)
    assert parse_meta(header, raw) == meta
    assert encode_meta(json.loads(raw)) == raw
    assert find_problem(meta) is None


@QUICK
@given(
    st.sampled_from(PLANS),
    st.booleans(),
    st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True),
    st.tuples(*[st.integers(1, 4)] * 7),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.integers(1, 20),
)
def test_any_legal_envelope_arrives_as_it_was_sent(tp_plan, recompute, steps, sizes, dtype, start):
    shapes = Shapes(*sizes, dtype)
    steps = tuple(sorted(steps, reverse=True))
    envelope = make(
        tp_plan, steps=steps, recompute=recompute, current_start_frame=start,
        height=shapes.latent_h * 8, width=shapes.latent_w * 8,
    )  # fmt: skip
    wanted = shapes.expected(tp_plan, num_steps=len(steps), do_kv_recompute=recompute, current_start_frame=start)
    generator = torch.Generator().manual_seed(start)
    tensors = {}
    for name, spec in wanted.items():
        if spec is None:
            tensors[name] = None
        elif name == "denoising_step_list":
            tensors[name] = torch.tensor(steps)
        else:
            tensors[name] = torch.randn(spec[0], generator=generator).to(getattr(torch, spec[1]))
    envelope = dataclasses.replace(envelope, tensors=tensors)
    frame = prepare(envelope, call_id=7, link=link(), shapes=shapes, limits=Limits(), buffer=PayloadBuffer())
    header = parse_header(frame.header_bytes, link(), Limits())
    back = rebuild(header, parse_meta(header, frame.meta), frame.payload.clone(), shapes=shapes, tp_plan=tp_plan)
    assert back.plan == envelope.plan
    assert set(back.tensors) == set(tensors)
    assert all(t is None or torch.equal(back.tensors[n], t) for n, t in tensors.items())


@QUICK
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(-2, 12), st.integers(0, 3)), max_size=12))
def test_a_link_never_goes_back(frames):
    state = LinkState()
    for call_id, chunk_index, cache_epoch in frames:
        before = dataclasses.replace(state)
        header = dataclasses.replace(FRAME.header, call_id=call_id, chunk_index=chunk_index, cache_epoch=cache_epoch)
        try:
            state.advance(header)
        except EngineError:
            assert state == before
        else:
            assert state.last_call_id > before.last_call_id
            assert state.last_chunk_index - before.last_chunk_index == (1 if chunk_index >= 0 else 0)
            assert state.cache_epoch - before.cache_epoch in (0, 1)
