"""The header's words, its checks in order, and the identifier rules of a link. No torch."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import FrameError
from engine.wire.header import (
    HEADER_BYTES,
    HEADER_WORDS,
    MAGIC,
    WIRE_VERSION,
    Action,
    Header,
    Limits,
    LinkState,
    Schema,
    parse_header,
)

LIMITS = Limits()
GOLDEN = Path(__file__).parents[1] / "cpu" / "golden"
WORDS = (
    "magic", "wire_version", "action", "call_id", "chunk_index", "cache_epoch", "control_epoch",
    "schema", "schema_version", "meta_bytes", "tensor_count", "payload_bytes", "meta_checksum",
)  # fmt: skip


def infer(**changes) -> Header:
    header = Header(Action.INFER, 7, 3, 2, 1, Schema.TP_ENVELOPE, 1, 100, 2, 64, 0)
    return replace(header, **changes)


def noop(**changes) -> Header:
    return replace(Header(Action.NOOP, 7, -1, 2, 1, Schema.NONE, 0, 0, 0, 0, 0), **changes).seal(b"")


def link(**changes) -> LinkState:
    return replace(LinkState(last_call_id=6, last_chunk_index=2, cache_epoch=2, control_epoch=1), **changes)


def with_word(header: Header, name: str, value: int) -> bytes:
    words = list(struct.unpack(f"<{HEADER_WORDS}q", header.pack()))
    words[WORDS.index(name)] = value
    return struct.pack(f"<{HEADER_WORDS}q", *words)


def test_pack_is_13_little_endian_words_in_the_order_of_the_contract():
    header = infer().seal(b"x" * 100)
    raw = header.pack()
    assert len(raw) == HEADER_BYTES == 104
    assert struct.unpack("<13q", raw) == (
        MAGIC, WIRE_VERSION, 1, 7, 3, 2, 1, 1, 1, 100, 2, 64, header.meta_checksum
    )  # fmt: skip
    assert parse_header(raw, link(), LIMITS) == header


def test_golden_noop_and_shutdown_headers():
    made = Header(Action.NOOP, 5, -1, 2, 3, Schema.NONE, 0, 0, 0, 0, 0).seal(b"")
    assert made.pack() == (GOLDEN / "noop.bin").read_bytes()
    made = Header(Action.SHUTDOWN, 6, -1, 2, 3, Schema.NONE, 0, 0, 0, 0, 0).seal(b"")
    assert made.pack() == (GOLDEN / "shutdown.bin").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 103, 105, 208])
def test_a_header_of_another_length_is_refused(size):
    with pytest.raises(FrameError) as caught:
        parse_header((infer().seal(b"").pack() * 2)[:size], link(), LIMITS)
    assert caught.value.field == "header"


@pytest.mark.parametrize(
    ("word", "value", "code"),
    [
        ("magic", MAGIC + 1, "TP-2203"),
        ("wire_version", 2, "TP-2204"),
        ("wire_version", 0, "TP-2204"),
        ("action", 5, "TP-2205"),
        ("action", -1, "TP-2205"),
        ("action", int(Action.RESULT), "TP-2205"),
        ("call_id", 6, "TP-2206"),
        ("call_id", 5, "TP-2206"),
        ("call_id", -1, "TP-2206"),
        ("chunk_index", 2, "TP-2207"),
        ("chunk_index", 4, "TP-2207"),
        ("chunk_index", -1, "TP-2207"),
        ("cache_epoch", 1, "TP-2208"),
        ("cache_epoch", 4, "TP-2208"),
        ("control_epoch", 0, "TP-2209"),
        ("schema", 9, "TP-2210"),
        ("schema", int(Schema.PP_ENVELOPE), "TP-2210"),
        ("schema", int(Schema.ERROR), "TP-2210"),
        ("schema_version", 2, "TP-2211"),
        ("meta_bytes", LIMITS.max_meta_bytes + 1, "TP-2212"),
        ("meta_bytes", -1, "TP-2212"),
        ("meta_bytes", 0, "TP-2212"),
        ("tensor_count", LIMITS.max_tensors + 1, "TP-2212"),
        ("payload_bytes", LIMITS.max_payload_bytes + 1, "TP-2212"),
        ("payload_bytes", 0, "TP-2212"),
        ("meta_checksum", 1 << 32, "TP-2212"),
    ],
)
def test_each_word_is_judged_by_name(word, value, code):
    with pytest.raises(FrameError) as caught:
        parse_header(with_word(infer().seal(b"x" * 100), word, value), link(), LIMITS)
    assert caught.value.field == word
    assert caught.value.code == code


def test_the_first_wrong_word_in_the_order_of_the_contract_is_named():
    order = ["magic", "wire_version", "action", "call_id", "chunk_index", "cache_epoch", "control_epoch",
             "schema", "schema_version", "meta_bytes"]  # fmt: skip
    bad = {"action": 9, "call_id": 0, "chunk_index": 9, "cache_epoch": 9, "control_epoch": 0, "schema": 9,
           "schema_version": 9, "meta_bytes": 1 << 40, "magic": 0, "wire_version": 9}  # fmt: skip
    words = list(struct.unpack("<13q", infer().seal(b"x" * 100).pack()))
    for name in order:
        words[WORDS.index(name)] = bad[name]
    for name in order:
        with pytest.raises(FrameError) as caught:
            parse_header(struct.pack("<13q", *words), link(), LIMITS)
        assert caught.value.field == name
        words[WORDS.index(name)] = struct.unpack("<13q", infer().pack())[WORDS.index(name)]


def test_a_frame_without_meta_is_checked_as_soon_as_its_header_is_read():
    good = noop()
    assert parse_header(good.pack(), link(), LIMITS) == good
    with pytest.raises(FrameError) as caught:
        parse_header(with_word(good, "call_id", 8), link(), LIMITS)  # a legal id, but not the one that was sealed
    assert caught.value.field == "meta_checksum"


def test_control_frames_carry_no_tensors():
    with pytest.raises(FrameError) as caught:
        parse_header(noop(tensor_count=1, payload_bytes=16).pack(), link(), LIMITS)
    assert caught.value.field == "tensor_count"


def test_parsing_does_not_advance_and_a_repeat_is_refused_after_advance():
    state, header = link(), infer().seal(b"x" * 100)
    parse_header(header.pack(), state, LIMITS)
    assert state == link()
    state.advance(header)
    assert state == LinkState(last_call_id=7, last_chunk_index=3, cache_epoch=2, control_epoch=1)
    with pytest.raises(FrameError, match="repeated"):
        parse_header(header.pack(), state, LIMITS)
    with pytest.raises(FrameError, match="repeated"):
        state.advance(header)
    assert state.last_call_id == 7


def test_warm_up_comes_before_the_first_chunk_only():
    state = LinkState()
    state.advance(infer(call_id=0, chunk_index=-1, cache_epoch=0, control_epoch=0))
    state.advance(infer(call_id=1, chunk_index=-1, cache_epoch=0, control_epoch=0))
    assert state.last_chunk_index == -1
    state.advance(infer(call_id=2, chunk_index=0, cache_epoch=0, control_epoch=0))
    with pytest.raises(FrameError, match="expected 1"):
        state.advance(infer(call_id=3, chunk_index=-1, cache_epoch=0, control_epoch=0))


def test_noop_keeps_the_place_of_the_chunks_and_cannot_cut():
    state = link()
    state.advance(noop(call_id=9))
    assert (state.last_call_id, state.last_chunk_index) == (9, 2)
    with pytest.raises(FrameError, match="jumps ahead"):
        state.advance(noop(call_id=10, cache_epoch=3))
    state.advance(infer(call_id=10))
    assert state.last_chunk_index == 3


@pytest.mark.parametrize(
    ("epoch", "init_cache", "last_chunk", "wrong"),
    [
        (2, False, 2, False),
        (3, True, 2, False),
        (3, False, 2, True),
        (2, True, 2, True),
        (2, True, -1, False),
    ],
)
def test_the_epoch_rises_exactly_at_a_hard_cut(epoch, init_cache, last_chunk, wrong):
    problem = link(last_chunk_index=last_chunk).cut_problem(infer(cache_epoch=epoch), init_cache)
    assert (problem is not None) == wrong
    if problem is not None:
        assert (problem.field, problem.fm) == ("cache_epoch", "FM-10")


def test_ids_are_what_errors_carry():
    with pytest.raises(FrameError) as caught:
        parse_header(with_word(infer(), "chunk_index", 9), link(), LIMITS)
    assert caught.value.ids == {"call_id": 7, "chunk_index": 9, "cache_epoch": 2}
    assert caught.value.exit_code == 70
