"""Which latents must be decoded before the next anchor can be made, for any F and K: enough, and not one too many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.codecs.context import ContextBuffers
from engine.errors import CodecError

PIXELS = 4  # of each latent but the first of a stream, which has one


def latents(first: int, count: int) -> torch.Tensor:
    """Latent i is the number i: [1, count, 1, 1, 1]."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, -1, 1, 1, 1)


def pixels(first: int, count: int) -> torch.Tensor:
    """The pixel frames that latents first .. first + count - 1 decode to, numbered in the stream's order."""
    start = 0 if first == 0 else PIXELS * first - 3
    return torch.arange(start, PIXELS * (first + count - 1) + 1, dtype=torch.float32).view(1, -1, 1, 1, 1)


class Encoder:
    """Keeps which pixel it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, pixels_B1CHW: torch.Tensor) -> torch.Tensor:
        assert pixels_B1CHW.shape[1] == 1
        self.seen.append(int(pixels_B1CHW))
        return pixels_B1CHW


def stream(buffers: ContextBuffers, size: int, chunks: int) -> None:
    """So many chunks, each remembered and decoded to its end."""
    for chunk in range(chunks):
        buffers.append_latents(latents(chunk * size, size))
        buffers.append_pixels(pixels(chunk * size, size))


sizes = {"size": st.integers(1, 6), "context": st.integers(1, 9), "chunks": st.integers(1, 12)}


@settings(deadline=None)
@given(**sizes, before=st.integers(0, 3))
def test_the_derived_latent_holds_the_anchor_pixel(size: int, context: int, chunks: int, before: int) -> None:
    """The newest chunk is decoded as far as derived: the anchor is there; with one latent less it is not."""
    start = size * chunks  # of the chunk to come
    for short in (0, 1):
        buffers, encode = ContextBuffers(context_frames=context, frames_per_chunk=size, anchor="reencode"), Encoder()
        stream(buffers, size, before)
        buffers.reset()  # a hard cut: the first chunk of a stream has 1 + 4 (n - 1) pixels again
        stream(buffers, size, chunks - 1)
        buffers.append_latents(latents(start - size, size))
        count = buffers.latents_to_anchor(start)
        assert 0 <= count <= size
        if count - short > 0:
            buffers.append_pixels(pixels(start - size, count - short))
        if start - size < context:
            assert count == 0  # the anchor is the stream's first latent, and needs no pixel
            assert int(buffers.anchor(start, encode)) == 0
            assert encode.seen == []
            continue
        if short and count:
            with pytest.raises(CodecError, match="is pixel"):
                buffers.anchor(start, encode)
            continue
        buffers.anchor(start, encode)
        # The oldest of the newest 1 + 4 (K - 1) pixels of all that the stream has.
        assert encode.seen == [1 + PIXELS * (start - 1) - (1 + PIXELS * (context - 1))]


@settings(deadline=None)
@given(**sizes)
def test_with_the_whole_chunk_decoded_nothing_is_left_to_decode(size: int, context: int, chunks: int) -> None:
    buffers = ContextBuffers(context_frames=context, frames_per_chunk=size, anchor="reencode")
    stream(buffers, size, chunks)
    assert buffers.latents_to_anchor(size * chunks) == 0


@pytest.mark.parametrize(
    ("size", "context", "count"), [(3, 3, 1), (3, 2, 2), (3, 1, 3), (3, 4, 0), (2, 3, 0), (4, 3, 2)]
)
def test_in_the_steady_stream_it_is_the_latent_f_minus_k_of_the_newest_chunk(
    size: int, context: int, count: int
) -> None:
    for chunks in range(1 + context + size, 12):
        buffers = ContextBuffers(context_frames=context, frames_per_chunk=size, anchor="reencode")
        stream(buffers, size, chunks - 1)
        buffers.append_latents(latents(size * (chunks - 1), size))
        assert buffers.latents_to_anchor(size * chunks) == count == max(0, size - context + 1)


@settings(deadline=None)
@given(**sizes)
def test_an_anchor_that_is_a_latent_waits_for_no_pixel(size: int, context: int, chunks: int) -> None:
    buffers = ContextBuffers(context_frames=context, frames_per_chunk=size, anchor="latent")
    for chunk in range(chunks):
        buffers.append_latents(latents(chunk * size, size))
    assert buffers.latents_to_anchor(size * chunks) == 0
