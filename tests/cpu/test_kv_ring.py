"""The ring against the obvious cache: concatenate, then slice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.errors import GeometryError, TripwireError
from engine.model.attention import attend
from engine.model.kv_cache import CrossAttnCache, KVCache

LAYERS, HEADS, WIDTH, TOKENS = 2, 2, 8, 4


def make(window: int, sink: int, batch: int = 1) -> KVCache:
    return KVCache(
        num_layers=LAYERS,
        heads=HEADS,
        head_dim=WIDTH,
        tokens_per_frame=TOKENS,
        window_frames=window,
        sink_frames=sink,
        dtype=torch.float32,
        device="cpu",
        batch=batch,
    )


class Naive:
    """Frames in order of age; a step of the same chunk replaces the frames it repeats."""

    def __init__(self, window: int, sink: int) -> None:
        self.window, self.sink = window, sink
        self.frames: list[int] = []
        self.k = torch.zeros(1, 0, HEADS, WIDTH)
        self.v = torch.zeros(1, 0, HEADS, WIDTH)

    def append(self, start: int, k: Tensor, v: Tensor) -> None:
        kept = sum(frame < start for frame in self.frames)
        self.frames = [*self.frames[:kept], *range(start, start + k.shape[1] // TOKENS)]
        self.k = torch.cat((self.k[:, : kept * TOKENS], k), 1)
        self.v = torch.cat((self.v[:, : kept * TOKENS], v), 1)
        excess = len(self.frames) - self.window
        if excess > 0:
            del self.frames[self.sink : self.sink + excess]
            head, tail = self.sink * TOKENS, (self.sink + excess) * TOKENS
            self.k = torch.cat((self.k[:, :head], self.k[:, tail:]), 1)
            self.v = torch.cat((self.v[:, :head], self.v[:, tail:]), 1)

    def bias(self, start: int, bias: float) -> Tensor:
        rows = [math.log(bias) if i > 0 and frame < start else 0.0 for i, frame in enumerate(self.frames)]
        return torch.tensor(rows).repeat_interleave(TOKENS)


@pytest.mark.parametrize(
    ("window", "sink", "frames"), [(6, 0, 3), (7, 0, 3), (6, 1, 3), (9, 2, 3), (8, 3, 2), (4, 0, 1)]
)
def test_ring_equals_concatenate_and_slice(window: int, sink: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(window * 10 + sink)

    def draw() -> Tensor:
        return torch.randn(1, frames * TOKENS, HEADS, WIDTH, generator=generator)

    ring = make(window, sink)
    storage = ring._k_NBTHd.data_ptr()
    naive = [Naive(window, sink) for _ in range(LAYERS)]
    start, evictions = 0, 0
    for chunk in range(20):
        if chunk in (9, 11):  # hard cuts: after evictions, and before the window is full
            ring.reset()
            naive = [Naive(window, sink) for _ in range(LAYERS)]
            start = 0
        for step in range(3):
            span = ring.span(start, frames)
            bias_T = ring.bias_for(span, 0.3, torch.float32)
            for layer in range(LAYERS):
                q, k, v = draw(), draw(), draw()
                naive[layer].append(start, k, v)
                live_k, live_v = ring.append(layer, span, k, v)
                assert live_k.shape == naive[layer].k.shape
                want_bias = naive[layer].bias(start, 0.3)
                assert (bias_T is None) == (not want_bias.any())
                got = attend(q, live_k, live_v, bias_T, backend="sdpa")
                want = attend(q, naive[layer].k, naive[layer].v, want_bias, backend="sdpa")
                torch.testing.assert_close(got, want, rtol=0, atol=2e-6, msg=f"chunk {chunk} step {step}")
                # Every live key is in the slot that the ring names for its frame, bit for bit.
                for age, frame in enumerate(naive[layer].frames):
                    slot = ring.slot(frame) * TOKENS
                    old = naive[layer].k[:, age * TOKENS : (age + 1) * TOKENS]
                    assert torch.equal(live_k[:, slot : slot + TOKENS], old)
                assert live_k.data_ptr() == ring._k_NBTHd[layer].data_ptr(), "a view, not a copy"
        start += frames
        evictions += start > window
        assert ring.global_end_index == [start * TOKENS] * LAYERS
        assert ring.local_end_index == [min(start, window) * TOKENS] * LAYERS
    assert evictions > 5
    assert ring._k_NBTHd.data_ptr() == storage


def fill(ring: KVCache, start: int, frames: int, value: float = 1.0, recompute: bool = False) -> None:
    span = ring.span(start, frames, recompute=recompute)
    for layer in range(LAYERS):
        new = torch.full((1, frames * TOKENS, HEADS, WIDTH), value)
        ring.append(layer, span, new, new)


def test_eviction_writes_only_the_frames_that_leave() -> None:
    ring = make(window=6, sink=1)
    for chunk in range(2):
        fill(ring, 3 * chunk, 3, value=float(chunk))
    before = ring._k_NBTHd.clone()
    fill(ring, 6, 3, value=9.0)
    changed = (ring._k_NBTHd != before).flatten(3).any(-1)[0, 0].reshape(6, TOKENS).all(1)
    assert changed.tolist() == [False, True, True, True, False, False]


def test_recompute_replaces_everything_and_places_follow() -> None:
    ring = make(window=6, sink=0)
    for chunk in range(4):
        fill(ring, 3 * chunk, 3, value=5.0)
    fill(ring, 0, 2, value=1.0, recompute=True)
    assert ring.global_end_index == ring.local_end_index == [2 * TOKENS] * LAYERS
    span = ring.span(2, 3)
    live_k, _ = ring.append(0, span, *[torch.full((1, 3 * TOKENS, HEADS, WIDTH), 2.0)] * 2)
    assert live_k.shape[1] == 5 * TOKENS
    assert live_k.unique().tolist() == [1.0, 2.0], "nothing from before the recompute is left"


def test_a_chunk_may_replace_the_last_frames_of_a_longer_recompute() -> None:
    ring = make(window=9, sink=0)
    fill(ring, 0, 3)
    fill(ring, 0, 5, value=1.0, recompute=True)
    fill(ring, 3, 3, value=2.0)
    assert ring.global_end_index == [6 * TOKENS] * LAYERS
    assert ring._k_NBTHd[0, 0, : 6 * TOKENS, 0, 0].tolist() == [1.0] * 3 * TOKENS + [2.0] * 3 * TOKENS


@pytest.mark.parametrize(
    ("start", "frames", "recompute", "why"),
    [
        (9, 3, False, "ends at frame 6"),
        (0, 3, False, "ends at frame 6"),
        (4, 3, False, "ends at frame 6"),
        (3, 2, False, "ends at frame 6"),
        (6, 7, False, "do not fit"),
        (6, 0, False, "do not fit"),
        (3, 3, True, "starts at frame 0"),
        (0, 7, True, "do not fit"),
    ],
)
def test_places_that_no_plan_leads_to_are_refused(start: int, frames: int, recompute: bool, why: str) -> None:
    ring = make(window=6, sink=0)
    fill(ring, 0, 3)
    fill(ring, 3, 3)
    before = (list(ring.global_end_index), list(ring.local_end_index))
    with pytest.raises(TripwireError, match=why) as caught:
        ring.span(start, frames, recompute=recompute)
    assert caught.value.code == "TP-6301"
    assert (ring.global_end_index, ring.local_end_index) == before
    fill(ring, 3, 3)  # the next step of the last chunk is still welcome


def test_a_forward_that_stopped_half_way_is_found() -> None:
    ring = make(window=6, sink=0)
    new = torch.zeros(1, 3 * TOKENS, HEADS, WIDTH)
    ring.append(0, ring.span(0, 3), new, new)
    with pytest.raises(TripwireError, match="half-way"):
        ring.span(3, 3)


def test_no_bias_tensor_where_it_would_change_nothing() -> None:
    ring = make(window=6, sink=0)
    assert ring.bias_for(ring.span(0, 3), 0.3, torch.float32) is None, "the first chunk has no past"
    fill(ring, 0, 1)
    assert ring.bias_for(ring.span(1, 3), 0.3, torch.float32) is None, "the past is only the window's first frame"
    fill(ring, 1, 3)
    assert ring.bias_for(ring.span(4, 3), 1.0, torch.float32) is None, "1 is off"
    assert ring.bias_for(ring.span(0, 3, recompute=True), 0.3, torch.float32) is None, "a recompute has no bias"
    assert ring.bias_for(ring.span(4, 3), 0.3, torch.float32) is not None


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (3, 3), (3, 4), (3, -1)])
def test_a_window_without_a_ring_is_refused(window: int, sink: int) -> None:
    with pytest.raises(GeometryError):
        make(window, sink)


def test_sizes_in_bytes() -> None:
    assert make(window=6, sink=0).nbytes == 2 * LAYERS * 6 * TOKENS * HEADS * WIDTH * 4
    cross = CrossAttnCache(
        num_layers=LAYERS, heads=HEADS, head_dim=WIDTH, text_len=10, dtype=torch.bfloat16, device="cpu"
    )
    assert cross.nbytes == 2 * LAYERS * 10 * HEADS * WIDTH * 2
    cross.valid = True
    cross.reset()
    assert not cross.valid
