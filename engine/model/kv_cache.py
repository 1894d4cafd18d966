"""The keys and values of the past, in a ring that never moves memory (contract, section 8).

Frame f of an epoch lives in slot f while f < sink, else in slot sink + (f - sink) mod (window - sink). A frame that
comes in thus overwrites exactly the frame that leaves, and the live slots are always a prefix of the memory: attention
reads one view, without a copy. Softmax does not care for the order of keys, and their positions are already in them;
only the bias depends on age, and `bias_for` works it out by slot.

Everything here follows from the plan alone. Keys of other ranks' heads are never seen.

Shape legend: N layers, B batch, T token slots (window x tokens a frame), L new tokens, H this rank's heads,
d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import GeometryError, TripwireError


@dataclass(frozen=True)
class Span:
    """Where one generator call reads and writes. `frames` frames from `start`, whole frames only.

    `writes` holds (first new token, end, first slot token): two entries at most per sink and ring when a chunk wraps.
    `live` counts the slot tokens that hold keys after the write: slots 0..live-1.
    """

    start: int
    frames: int
    recompute: bool
    writes: tuple[tuple[int, int, int], ...]
    live: int

    @property
    def end(self) -> int:
        return self.start + self.frames


class KVCache:
    """Self-attention keys (after norm and RoPE) and raw values of this rank's heads, for all layers.

    Args:
        num_layers, heads, head_dim: of this rank's shard.
        tokens_per_frame: S, tokens of one latent frame.
        window_frames: W, frames that attention sees, the new ones included.
        sink_frames: first frames of an epoch that stay for ever.
        dtype, device: of the tensors.

    Raises:
        GeometryError: sizes that leave no ring.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        heads: int,
        head_dim: int,
        tokens_per_frame: int,
        window_frames: int,
        sink_frames: int,
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int = 1,
    ) -> None:
        if min(num_layers, heads, head_dim, tokens_per_frame, batch) < 1 or not 0 <= sink_frames < window_frames:
            raise GeometryError(
                f"a window of {window_frames} frames with {sink_frames} sink frames of {tokens_per_frame} tokens, "
                f"{heads} heads of {head_dim} and {num_layers} layers cannot hold a ring",
                code="TP-1104",
            )
        self.tokens_per_frame = tokens_per_frame
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        shape = (num_layers, batch, window_frames * tokens_per_frame, heads, head_dim)
        self._k_NBTHd = torch.zeros(shape, dtype=dtype, device=device)
        self._v_NBTHd = torch.zeros(shape, dtype=dtype, device=device)
        self.global_end_index = [0] * num_layers
        self.local_end_index = [0] * num_layers
        self._last: Span | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, batch, heads, head width)."""
        layers, batch, _, heads, head_dim = self._k_NBTHd.shape
        return layers, batch, heads, head_dim

    @property
    def nbytes(self) -> int:
        return self._k_NBTHd.nbytes + self._v_NBTHd.nbytes

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values [N, B, T, H, d], all slots, live or not. For auditors: they look, and write nothing."""
        return self._k_NBTHd, self._v_NBTHd

    @property
    def last(self) -> Span | None:
        """The last call's span; None after a reset."""
        return self._last

    @property
    def end_frame(self) -> int:
        """Frames appended since the last reset or recompute."""
        return self.global_end_index[-1] // self.tokens_per_frame

    def reset(self) -> None:
        """RESET: empty, both indices 0. Old keys stay in memory, out of every view."""
        self.global_end_index = [0] * len(self.global_end_index)
        self.local_end_index = [0] * len(self.local_end_index)
        self._last = None

    def span(self, start_frame: int, frames: int, *, recompute: bool = False) -> Span:
        """What a call over `frames` frames at `start_frame` may do now. Changes nothing.

        A call appends (it starts where the cache ends), repeats the last call's frames (a further step of the same
        chunk), or follows a recompute whose last frames it replaces. A recompute starts at 0 and replaces all.

        Raises:
            TripwireError: any other place, more frames than the ring holds, or a forward that stopped half-way.
        """
        end = self.end_frame
        problem = ""
        if len(set(self.global_end_index)) > 1 or len(set(self.local_end_index)) > 1:
            problem = "the layers disagree: an earlier call stopped half-way"
        elif recompute and start_frame != 0:
            problem = f"a recompute starts at frame 0, not at {start_frame}"
        elif not recompute and start_frame != end:
            last = self._last
            repeats = last is not None and not last.recompute and (last.start, last.frames) == (start_frame, frames)
            replaces = last is not None and last.recompute and 0 <= start_frame < end <= start_frame + frames
            if not repeats and not replaces:
                problem = (
                    f"the cache ends at frame {end}; a call over {frames} frames at {start_frame} is no step of it"
                )
        ring = self.window_frames - self.sink_frames
        in_ring = start_frame + frames - max(start_frame, self.sink_frames)
        if not problem and (frames < 1 or in_ring > ring):
            problem = f"{frames} frames at {start_frame} do not fit into a ring of {ring} frames"
        if problem:
            raise TripwireError(
                f"the KV cache refuses a call: {problem}",
                code="TP-6301",
                fm="FM-10",
                evidence={"start_frame": start_frame, "frames": frames, "end_frame": end, "recompute": recompute},
            )
        size = self.tokens_per_frame
        live = min(start_frame + frames, self.window_frames) * size
        return Span(start_frame, frames, recompute, self._writes(start_frame, frames), live)

    def append(self, layer: int, span: Span, k_BLHd: Tensor, v_BLHd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one layer; return views [B, live, H, d] of all it may attend to."""
        k_BTHd, v_BTHd = self._k_NBTHd[layer], self._v_NBTHd[layer]
        for first, stop, slot in span.writes:
            k_BTHd[:, slot : slot + stop - first] = k_BLHd[:, first:stop]
            v_BTHd[:, slot : slot + stop - first] = v_BLHd[:, first:stop]
        self.global_end_index[layer] = span.end * self.tokens_per_frame
        self.local_end_index[layer] = span.live
        self._last = span
        return k_BTHd[:, : span.live], v_BTHd[:, : span.live]

    def bias_for(self, span: Span, bias: float, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of each live slot: log(bias) for the past but for the window's first frame.

        Returns [live] of `dtype` on the cache's device, or None where nothing would change.
        """
        first = 0 if self.sink_frames else max(0, span.end - self.window_frames)
        unbiased = {first, *range(span.start, span.end)}
        live_frames = span.live // self.tokens_per_frame
        if bias == 1.0 or span.recompute or len(unbiased) == live_frames:
            return None
        scores = torch.full((live_frames,), math.log(bias), dtype=torch.float32)
        scores[[self.slot(frame) for frame in unbiased]] = 0.0
        return scores.repeat_interleave(self.tokens_per_frame).to(self._k_NBTHd.device, dtype)

    def slot(self, frame: int) -> int:
        """The slot of a frame, in frames."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.window_frames - self.sink_frames)

    def _writes(self, start: int, frames: int) -> tuple[tuple[int, int, int], ...]:
        """Runs of neighbouring slots, in tokens."""
        size = self.tokens_per_frame
        runs: list[tuple[int, int, int]] = []
        for number in range(frames):
            slot = self.slot(start + number)
            if runs and runs[-1][2] + (number - runs[-1][0]) == slot:
                runs[-1] = (runs[-1][0], number + 1, runs[-1][2])
            else:
                runs.append((number, number + 1, slot))
        return tuple((first * size, stop * size, slot * size) for first, stop, slot in runs)


class CrossAttnCache:
    """Text keys (after norm) and values of this rank's heads, for all layers; rebuilt where `valid` is false.

    `valid` follows from the plan: `reset` clears it, the next generator call fills the cache and sets it.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        heads: int,
        head_dim: int,
        text_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int = 1,
    ) -> None:
        shape = (num_layers, batch, text_len, heads, head_dim)
        self.k_NBTHd = torch.zeros(shape, dtype=dtype, device=device)
        self.v_NBTHd = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(layers, batch, heads, head width)."""
        layers, batch, _, heads, head_dim = self.k_NBTHd.shape
        return layers, batch, heads, head_dim

    @property
    def text_len(self) -> int:
        return self.k_NBTHd.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k_NBTHd.nbytes + self.v_NBTHd.nbytes

    def reset(self) -> None:
        """CROSS-RESET: the next call rebuilds."""
        self.valid = False
