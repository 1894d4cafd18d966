"""Context frames: what Stage 0 remembers of the stream, and the frames a recompute call is given.

Letters in names: B batch, F latent frames of a chunk, K context frames, T pixel frames, C channels, H, W.

Latent i of a stream covers pixel 0 for i = 0, and pixels 4i-3 .. 4i after that, so its last pixel is 4i. With all of
`n` latents decoded, the oldest of the newest 1 + 4(K-1) pixels is 4(n - K): the last pixel of the K-th last latent.
The anchor is looked up by that number and not as "the oldest entry", so it is found as soon as it is decoded, whether
or not the rest of its chunk is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import VAE_TEMPORAL
from engine.errors import CodecError, ConfigError

ANCHORS = ("reencode", "latent")


class ContextBuffers:
    """The two buffers of the contract, section 8, and the rule that makes context frames from them.

    Args:
        context_frames: K, latent frames given to the recompute call.
        frames_per_chunk: F.
        anchor: "reencode" (R0a) encodes the anchor pixel anew; "latent" (R0) takes the latent of that pixel.
    """

    def __init__(self, *, context_frames: int, frames_per_chunk: int, anchor: str) -> None:
        if context_frames < 1 or frames_per_chunk < 1:
            raise ConfigError(
                f"context_frames and frames_per_chunk must be at least 1, are {context_frames} and {frames_per_chunk}"
            )
        if anchor not in ANCHORS:
            raise ConfigError(f"anchor must be one of {', '.join(ANCHORS)}, is {anchor!r}")
        self._context = context_frames
        self._chunk = frames_per_chunk
        self._anchor = anchor
        self._pixel_slots = 1 + VAE_TEMPORAL * (context_frames - 1)
        self.reset()

    def reset(self) -> None:
        """A hard cut: nothing of the old stream is left."""
        self.decoded_frame_buffer: Tensor | None = None  # [B, at most 1+4(K-1), 3, H, W]: the newest pixels
        self.context_frame_buffer: Tensor | None = None  # [B, at most K, C, h, w]: the newest latents
        self._first_latent_B1CHW: Tensor | None = None
        self._latents_seen = 0
        self._pixels_seen = 0

    def append_latents(self, latents_BFCHW: Tensor) -> None:
        """Remember latents that the generator made, any number of frames, in the order of the stream."""
        if self._first_latent_B1CHW is None:
            self._first_latent_B1CHW = latents_BFCHW[:, :1].clone()
        self.context_frame_buffer = _newest(self.context_frame_buffer, latents_BFCHW, self._context)
        self._latents_seen += latents_BFCHW.shape[1]

    def append_pixels(self, pixels_BTCHW: Tensor) -> None:
        """Remember decoded frames, any number, in the order of the stream."""
        self.decoded_frame_buffer = _newest(self.decoded_frame_buffer, pixels_BTCHW, self._pixel_slots)
        self._pixels_seen += pixels_BTCHW.shape[1]

    def latents_to_anchor(self, current_start_frame: int) -> int:
        """How many latents must still be decoded before the anchor of `current_start_frame` can be made.

        Latent i ends with pixel 4i, and the anchor is pixel 4 (current_start_frame - K): so decode up to latent
        current_start_frame - K, whatever F and K are. With F = K that is the first latent of the newest chunk; with
        F < K it has been decoded with an earlier chunk.
        """
        if self._anchor == "latent" or current_start_frame - self._chunk < self._context:
            return 0
        decoded = (self._pixels_seen + VAE_TEMPORAL - 1) // VAE_TEMPORAL
        return max(0, current_start_frame - self._context + 1 - decoded)

    def context_frames(self, current_start_frame: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, min(K, current_start_frame), C, h, w]: the anchor and the latents after it."""
        return self.assemble(self.anchor(current_start_frame, encode), current_start_frame)

    def anchor(self, current_start_frame: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The first context frame, [B, 1, C, h, w].

        Args:
            current_start_frame: of the chunk that will be recomputed: latent frames since the last hard cut.
            encode: `StreamingVAE.encode_frame`; called at most once.

        Raises:
            CodecError: the first chunk has no context; the buffers do not hold exactly the latents before
                `current_start_frame`; the anchor pixel is not decoded yet, or is gone.
        """
        buffer_BKCHW, first_B1CHW = self._checked(current_start_frame)
        if current_start_frame - self._chunk < self._context:
            return first_B1CHW
        # Here current_start_frame >= K + F, so the K-th last latent exists and the buffer is full.
        if self._anchor == "latent":
            return buffer_BKCHW[:, :1]
        wanted = VAE_TEMPORAL * (current_start_frame - self._context)
        pixels_BTCHW = self.decoded_frame_buffer
        held = 0 if pixels_BTCHW is None else pixels_BTCHW.shape[1]
        offset = wanted - (self._pixels_seen - held)
        if pixels_BTCHW is None or not 0 <= offset < held:
            raise CodecError(
                f"the anchor of frame {current_start_frame} is pixel {wanted}, but decoded_frame_buffer holds "
                f"{self._pixels_seen - held} to {self._pixels_seen - 1}",
                code="TP-5022",
            )
        return encode(pixels_BTCHW[:, offset : offset + 1])

    def assemble(self, anchor_B1CHW: Tensor, current_start_frame: int) -> Tensor:
        """The anchor, then the newest min(K, current_start_frame) - 1 latents: [B, min(K, start), C, h, w]."""
        buffer_BKCHW, _ = self._checked(current_start_frame)
        if anchor_B1CHW.shape != buffer_BKCHW[:, :1].shape:
            raise CodecError(
                f"the anchor is {tuple(anchor_B1CHW.shape)}, the latents are {tuple(buffer_BKCHW.shape)}",
                code="TP-5023",
            )
        later = min(self._context, current_start_frame) - 1
        newest_BKCHW = buffer_BKCHW[:, buffer_BKCHW.shape[1] - later :]
        return torch.cat([anchor_B1CHW.to(newest_BKCHW), newest_BKCHW], dim=1)

    def _checked(self, current_start_frame: int) -> tuple[Tensor, Tensor]:
        if current_start_frame == 0:
            raise CodecError("the first chunk of a stream has no context frames", code="TP-5020")
        if (
            self.context_frame_buffer is None
            or self._first_latent_B1CHW is None
            or (self._latents_seen != current_start_frame)
        ):
            raise CodecError(
                f"context for frame {current_start_frame} needs the {current_start_frame} latents before it, "
                f"but {self._latents_seen} were appended since the last hard cut",
                code="TP-5021",
            )
        return self.context_frame_buffer, self._first_latent_B1CHW


def _newest(held: Tensor | None, new: Tensor, slots: int) -> Tensor:
    """The last `slots` frames of held + new along dim 1, in memory of their own."""
    keep = slots - new.shape[1]
    if held is None or keep <= 0:
        return new[:, -slots:].clone()
    return torch.cat([held[:, -keep:], new.to(held)], dim=1)
