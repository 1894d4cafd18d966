"""Context frames against the contract's rule, written out frame by frame."""

from __future__ import annotations

import pytest
import torch

from engine.codecs.context import ContextBuffers
from engine.errors import CodecError, ConfigError


def latents(first: int, count: int) -> torch.Tensor:
    """Latent i of the stream is the number i everywhere: [1, count, 16, 2, 2]."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, -1, 1, 1, 1).expand(1, count, 16, 2, 2)


def pixels(first: int, count: int) -> torch.Tensor:
    """Pixel frame j is the number j everywhere: [1, count, 3, 16, 16]."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, -1, 1, 1, 1).expand(1, count, 3, 16, 16)


def encode(pixels_B1CHW: torch.Tensor) -> torch.Tensor:
    """Marks what was encoded: pixel j becomes latent 1000 + j."""
    assert pixels_B1CHW.shape[1] == 1
    return 1000 + pixels_B1CHW[:, :, :1, :2, :2].expand(1, 1, 16, 2, 2)


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("encoded, where the contract takes a latent")


def numbers(context_BKCHW: torch.Tensor) -> list[int]:
    assert context_BKCHW.shape[2:] == (16, 2, 2)
    assert bool((context_BKCHW == context_BKCHW[:, :, :1, :1, :1]).all())
    return [int(value) for value in context_BKCHW[0, :, 0, 0, 0]]


def stream(buffers: ContextBuffers, chunks: int, size: int) -> None:
    """`chunks` chunks of `size` latents, decoded completely."""
    for chunk in range(chunks):
        start = chunk * size
        buffers.append_latents(latents(start, size))
        first = 0 if start == 0 else 4 * start - 3
        buffers.append_pixels(pixels(first, 4 * size - 3 if start == 0 else 4 * size))


def made(context: int = 3, size: int = 3, anchor: str = "reencode", chunks: int = 0) -> ContextBuffers:
    buffers = ContextBuffers(context_frames=context, frames_per_chunk=size, anchor=anchor)
    stream(buffers, chunks, size)
    return buffers


def test_the_first_chunk_has_none():
    with pytest.raises(CodecError, match="first chunk"):
        made().context_frames(0, encode)


@pytest.mark.parametrize("anchor", ["reencode", "latent"])
def test_the_second_chunk_starts_at_the_first_latent(anchor: str):
    assert numbers(made(anchor=anchor, chunks=1).context_frames(3, refuse)) == [0, 1, 2]


@pytest.mark.parametrize(("chunks", "pixel", "later"), [(2, 12, [4, 5]), (3, 24, [7, 8]), (9, 96, [25, 26])])
def test_later_chunks_reencode_the_oldest_decoded_frame(chunks: int, pixel: int, later: list[int]):
    buffers = made(chunks=chunks)
    assert buffers.decoded_frame_buffer is not None
    assert buffers.decoded_frame_buffer.shape[1] == 9
    assert int(buffers.decoded_frame_buffer[0, 0, 0, 0, 0]) == pixel
    assert numbers(buffers.context_frames(3 * chunks, encode)) == [1000 + pixel, *later]


def test_latent_anchor_is_the_latent_of_the_anchor_pixel():
    # Pixel 12 is the last of latent 3, and latent 3 comes before latents 4 and 5.
    assert numbers(made(anchor="latent", chunks=2).context_frames(6, refuse)) == [3, 4, 5]


def rule(start: int, context: int, size: int) -> list[int]:
    """The contract's words as a list, re-encoded pixels as 1000 + number."""
    count = min(context, start)
    newest = list(range(start - count + 1, start))
    if start - size < context:
        return [0, *newest]
    total_pixels = 1 + 4 * (start - 1)
    return [1000 + total_pixels - (1 + 4 * (context - 1)), *newest]


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_size_follows_the_rule_at_every_chunk(context: int, size: int):
    for chunks in range(1, 10):
        start = chunks * size
        found = numbers(made(context, size, chunks=chunks).context_frames(start, encode))
        assert found == rule(start, context, size), start
        assert len(found) == min(context, start)


def test_one_context_frame_is_the_anchor_alone():
    assert numbers(made(context=1, chunks=1).context_frames(3, refuse)) == [0]
    assert numbers(made(context=1, chunks=3).context_frames(9, encode)) == [1032]


def test_the_anchor_is_there_as_soon_as_its_latent_is_decoded():
    whole = made(chunks=4).context_frames(12, encode)
    early = made(chunks=3)
    early.append_latents(latents(9, 3))
    with pytest.raises(CodecError, match="pixel 36") as caught:
        early.anchor(12, encode)
    assert caught.value.code == "TP-5022"
    early.append_pixels(pixels(33, 4))  # of latent 9 alone; latents 10 and 11 wait
    assert torch.equal(early.context_frames(12, encode), whole)


def test_a_hard_cut_forgets_the_stream():
    buffers = made(chunks=3)
    buffers.reset()
    assert buffers.decoded_frame_buffer is None
    assert buffers.context_frame_buffer is None
    with pytest.raises(CodecError):
        buffers.context_frames(9, encode)
    buffers.append_latents(latents(50, 3))
    assert numbers(buffers.context_frames(3, refuse)) == [50, 51, 52]


@pytest.mark.parametrize("start", [3, 6, 10, 12])
def test_a_position_that_does_not_match_the_latents_is_refused(start: int):
    with pytest.raises(CodecError, match="9 were appended") as caught:
        made(chunks=3).context_frames(start, encode)
    assert caught.value.code == "TP-5021"


def test_the_two_halves_are_the_whole_and_an_anchor_of_other_size_is_refused():
    buffers = made(chunks=2)
    anchor = buffers.anchor(6, encode)
    assert torch.equal(buffers.assemble(anchor, 6), buffers.context_frames(6, encode))
    with pytest.raises(CodecError, match="anchor is"):
        buffers.assemble(anchor[..., :1], 6)


def test_buffers_own_their_memory_and_hold_no_more_than_they_need():
    buffers = made()
    chunk = latents(0, 3).clone()
    frames = pixels(0, 30).clone()
    buffers.append_latents(chunk)
    buffers.append_pixels(frames)
    chunk.fill_(-1)
    frames.fill_(-1)
    assert numbers(buffers.context_frames(3, refuse)) == [0, 1, 2]
    held = buffers.decoded_frame_buffer
    assert held is not None
    assert held.untyped_storage().nbytes() == held.nbytes == 9 * 3 * 16 * 16 * 4
    assert int(held.min()) == 21


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError):
        ContextBuffers(context_frames=0, frames_per_chunk=3, anchor="reencode")
    with pytest.raises(ConfigError, match="reencode, latent"):
        ContextBuffers(context_frames=3, frames_per_chunk=3, anchor="pixel")
