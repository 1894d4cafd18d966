"""Samples of the caches after each generator call: little enough to keep, enough to find a drift anywhere.

For each call, layer and head, of keys and of values:

- `samples`: SAMPLED_TOKENS tokens x SAMPLED_DIMS dims, half of the tokens from what the call wrote, half from all that
  it may attend to. Which ones follows from (chunk, call, layer, head) alone, so every process takes the same.
- `sums`: for each frame of the window three sums in float64: plain, of magnitudes, and with fixed pseudo-random signs.
  A value that drifts where no sample lies moves one of them. The signed sum is the sharp one: rounding errors of n
  values grow in it like sqrt(n), whether they agree in sign or not.
- `text_sums`: the same three over the text cache.
- `spans`: first frame, frames and live tokens of the call.

Shape legend: N layers, X keys and values (2), T token slots, H this rank's heads, d head width, P sampled tokens,
D sampled dims, W frames of the window, S tokens a frame, M kinds of sums (3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.model.kv_cache import CrossAttnCache, KVCache, Span
from engine.sealed import SAMPLES_ALGORITHM, SAMPLES_SCHEMA, SAMPLES_VERSION, SUMS

SAMPLED_TOKENS = 16
SAMPLED_DIMS = 4


class KVSampler:
    """Takes the samples of one rank's heads, call by call, for one chunk at a time.

    Args:
        first_head: of this rank's heads, counted over the whole model.
        total_heads: of the whole model.
    """

    def __init__(self, first_head: int, total_heads: int) -> None:
        self.first_head = first_head
        self.total_heads = total_heads
        self._chunk_index = -1
        self._calls: dict[str, list[torch.Tensor]] = {}
        self._sizes: dict[str, int] = {}
        self._signs: dict[tuple[int, int], torch.Tensor] = {}

    def begin(self, chunk_index: int) -> None:
        self._chunk_index = chunk_index
        self._calls = {"samples": [], "sums": [], "text_sums": [], "spans": []}

    @torch.inference_mode()
    def call(self, kv: KVCache, cross: CrossAttnCache) -> None:
        """After a generator call; nothing is waited for on a device."""
        span = kv.last
        if span is None:
            raise ValueError("no generator call has filled the cache yet")
        self._sizes = {"frame_tokens": kv.tokens_per_frame, "text_len": cross.text_len, "head_dim": kv.shape[3]}
        self._calls["samples"].append(self._sample(kv, span, len(self._calls["spans"])))
        self._calls["sums"].append(self._sums(kv, span))
        texts_NTHd = (cross.k_NBTHd[:, 0], cross.v_NBTHd[:, 0])
        rows = [torch.stack([self._three(x_THd[None])[:, 0] for x_THd in text]) for text in texts_NTHd]
        self._calls["text_sums"].append(torch.stack(rows, dim=1))
        self._calls["spans"].append(torch.tensor([span.start, span.frames, span.live]))

    def to_bytes(self, facts: dict[str, Any]) -> bytes:
        """The chunk's samples as safetensors, its metadata with the facts given."""
        from safetensors.torch import save

        tensors = {name: torch.stack(calls).cpu().contiguous() for name, calls in self._calls.items()}
        own = {
            "schema": SAMPLES_SCHEMA,
            "schema_version": SAMPLES_VERSION,
            "algorithm": SAMPLES_ALGORITHM,
            "first_head": self.first_head,
            "total_heads": self.total_heads,
            **self._sizes,
        }
        raw: bytes = save(tensors, {key: str(value) for key, value in {**own, **facts}.items()})
        return raw

    def _sample(self, kv: KVCache, span: Span, call: int) -> torch.Tensor:
        """float32 [N, X, H, P, D]."""
        layers, _, heads, head_dim = kv.shape
        tokens_NHP, dims_NHPD = places(
            self._chunk_index, call, layers, range(self.first_head, self.first_head + heads), head_dim, span
        )
        device = kv.memory[0].device
        n_N111 = torch.arange(layers, device=device)[:, None, None, None]
        h_H11 = torch.arange(heads, device=device)[:, None, None]
        t_NHP1 = torch.from_numpy(tokens_NHP).to(device)[..., None]
        q_NHPD = torch.from_numpy(dims_NHPD).to(device)
        return torch.stack([x_NBTHd[:, 0][n_N111, t_NHP1, h_H11, q_NHPD].float() for x_NBTHd in kv.memory], dim=1)

    def _sums(self, kv: KVCache, span: Span) -> torch.Tensor:
        """float64 [N, X, H, W, M]; frames that are not live read zero."""
        layers, _, heads, head_dim = kv.shape
        size, device = kv.tokens_per_frame, kv.memory[0].device
        sums_NXHWM = torch.zeros(
            layers, 2, heads, kv.window_frames, len(SUMS), dtype=torch.float64, device=device
        )  # layer by layer: a float64 copy of the whole cache might not fit
        for layer in range(layers):
            for number, x_NBTHd in enumerate(kv.memory):
                x_WSHd = x_NBTHd[layer, 0, : span.live].view(-1, size, heads, head_dim)
                sums_NXHWM[layer, number, :, : len(x_WSHd)] = self._three(x_WSHd)
        return sums_NXHWM

    def _three(self, x_WTHd: torch.Tensor) -> torch.Tensor:
        """float64 [H, W, M] over tokens and dims."""
        x_WTHd = x_WTHd.double()
        signs_T1d = self._sign_table(x_WTHd.shape[1], x_WTHd.shape[3], x_WTHd.device)[:, None]
        sums = [x_WTHd.sum((1, 3)), x_WTHd.abs().sum((1, 3)), (x_WTHd * signs_T1d).sum((1, 3))]
        return torch.stack(sums, dim=-1).transpose(0, 1)

    def _sign_table(self, tokens: int, dims: int, device: torch.device) -> torch.Tensor:
        key = (tokens, dims)
        if key not in self._signs:
            words = scramble(np.arange(tokens * dims, dtype=np.uint64)).reshape(tokens, dims)
            self._signs[key] = torch.from_numpy(np.where(words >> np.uint64(63), -1.0, 1.0)).to(device)
        return self._signs[key]


def places(
    chunk_index: int, call: int, layers: int, heads: range, head_dim: int, span: Span
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where to sample: slot tokens int64 [N, H, P] and dims int64 [N, H, P, D]. `heads` as the whole model counts."""
    state = np.array([((chunk_index + 1) << 20) + call], dtype=np.uint64)
    for part in (
        np.arange(layers)[:, None, None, None],
        np.array(heads)[:, None, None],
        np.arange(SAMPLED_TOKENS)[:, None],
        np.arange(1 + SAMPLED_DIMS),
    ):
        state = scramble(state + part.astype(np.uint64))
    words_NHPD = state
    written = np.concatenate([np.arange(slot, slot + stop - first) for first, stop, slot in span.writes])
    tokens_NHP = (words_NHPD[..., 0] % np.uint64(span.live)).astype(np.int64)
    half = SAMPLED_TOKENS // 2
    tokens_NHP[..., :half] = written[(words_NHPD[..., :half, 0] % np.uint64(len(written))).astype(np.int64)]
    return tokens_NHP, (words_NHPD[..., 1:] % np.uint64(head_dim)).astype(np.int64)


def scramble(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): the same on every machine and version."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
