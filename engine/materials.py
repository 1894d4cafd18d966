"""What phase A derives and phase C decodes: text, noise, context frames, pixels.

Rank 0 holds all of it. In the plans before v1.1c a worker holds the parts that the plan has not yet moved off it, and
`complete` fills in what its envelope does not carry. `PARTS` is the whole difference between the plans.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.assets import text_encoder_dir, vae_dir
from engine.codecs.context import ContextBuffers
from engine.config import VAE_TEMPORAL, EngineConfig
from engine.errors import CodecError
from engine.lifecycle import Doing
from engine.plan import V0, V1, V11A, V11B, ChunkPlan
from engine.wire.envelope import Envelope

if TYPE_CHECKING:
    from engine.codecs.text import TextEncoder
    from engine.codecs.vae import StreamingVAE
    from engine.sources.video import VideoSource

# Shape legend: B batch (1), F latent frames of a chunk, K context frames, C latent channels, H W latent or pixel size,
# T pixel frames, L text tokens, D text width, N denoise steps.


@dataclass(frozen=True)
class Parts:
    """Which of Stage 0's parts a rank holds."""

    text: bool
    noise: bool
    vae_encoder: bool
    vae_decoder: bool

    @property
    def any(self) -> bool:
        return self.text or self.noise or self.vae_encoder or self.vae_decoder


RANK0 = Parts(text=True, noise=True, vae_encoder=True, vae_decoder=True)
PARTS: dict[str, Parts] = {
    V0: RANK0,
    V11A: Parts(text=False, noise=True, vae_encoder=True, vae_decoder=True),
    V11B: Parts(text=False, noise=False, vae_encoder=False, vae_decoder=True),
    V1: Parts(text=False, noise=False, vae_encoder=False, vae_decoder=False),
}


class Materials:
    """The parts of one rank, with their streaming state (VAE feature cache, context buffers).

    Args:
        config: sizes, seeds, paths.
        parts: what to load; nothing else is held.
        device: where the codecs and the tensors live.
        warn: told about a truncated prompt.
    """

    def __init__(self, config: EngineConfig, parts: Parts, device: str, warn: Callable[[str], None]) -> None:
        self.config = config
        self.parts = parts
        self.device = device
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._warn = warn
        # Told what phase A is at: its source, and then itself again. A loop that says so to others puts its own here.
        self.at: Callable[[Doing], None] = lambda doing: None
        self.text: TextEncoder | None = None
        self.vae: StreamingVAE | None = None
        if parts.text:
            from engine.codecs.text import TextEncoder

            self.text = TextEncoder.load(
                text_encoder_dir(config), config.dims.text_len, device=device, dtype=self.dtype
            )
        if parts.vae_encoder or parts.vae_decoder:
            from engine.codecs.vae import StreamingVAE

            self.vae = StreamingVAE.load(
                vae_dir(config),
                device=device,
                dtype=self.dtype,
                encoder=parts.vae_encoder,
                decoder=parts.vae_decoder,
            )
        geometry = config.geometry
        self.source: VideoSource | None = None
        self.source_sha256: str | None = None
        if config.source.video and parts.noise:  # whoever makes the noise makes the latents out of it
            from engine.sources.video import VideoSource

            source = config.source
            self.source = VideoSource(
                Path(source.video), height=geometry.height, width=geometry.width, on_end=source.on_end
            )
            self.source_sha256 = self.source.digest()
            if self.source.rate is not None and abs(self.source.rate - config.sink.fps) > 0.01 * config.sink.fps:
                warn(
                    f"{source.video} has {self.source.rate:g} frames a second and sink.fps is {config.sink.fps}: "
                    "frame follows frame, so the stream plays at another speed"
                )
        self.buffers = ContextBuffers(
            context_frames=geometry.context_frames,
            frames_per_chunk=geometry.frames_per_chunk,
            anchor=config.schedule.anchor,
        )
        self.t_encode_ms = 0.0  # what the newest `complete` spent on encoding its anchor
        self._prompt: str | None = None
        self._conditioning_BLD: torch.Tensor | None = None

    @torch.inference_mode()
    def complete(self, envelope: Envelope) -> Envelope:
        """The envelope with every tensor that phase B needs: what it lacks is derived here, by the plan.

        Raises:
            CodecError: the plan expects this rank to derive what it holds no part for.
        """
        plan = envelope.plan
        self.t_encode_ms = 0.0
        if plan.init_cache:
            self.reset()
        tensors = dict(envelope.tensors)
        if "conditioning_embeds" not in tensors:
            tensors["conditioning_embeds"] = self.conditioning(envelope.prompt)
        if "latents" not in tensors:
            tensors |= self.noise(plan)
        if plan.do_kv_recompute:
            tensors["context_frames"] = self._context(plan, tensors.get("context_frames"))
        else:
            tensors["context_frames"] = None
        return dataclasses.replace(envelope, tensors=tensors)

    @torch.inference_mode()
    def conditioning(self, prompt: str | None) -> torch.Tensor:
        """`conditioning_embeds` [1, L, D]; encoded once a prompt."""
        if self.text is None or prompt is None:
            raise CodecError("this rank's plan derives conditioning, but it holds no text encoder or no prompt")
        if self._conditioning_BLD is None or prompt != self._prompt:
            encoded = self.text.encode(prompt)
            if encoded.truncated:
                self._warn(
                    f"the prompt is longer than {self.config.dims.text_len} tokens and was cut there: "
                    f"'{prompt[:40]}...'"
                )
            self._prompt, self._conditioning_BLD = prompt, encoded.embeds_1LD
        return self._conditioning_BLD

    def noise(self, plan: ChunkPlan) -> dict[str, torch.Tensor | None]:
        """`latents` [1, F, C, H, W] and `renoise` [N-1, 1, F, C, H, W].

        One CPU generator a chunk, seeded base_seed + current_start_frame: the latents first, then the noise of each
        later step. So a hard cut with the same seed repeats the first chunk; of a source only its noise, for the video
        goes on.
        """
        generator = torch.Generator("cpu").manual_seed(plan.base_seed + plan.current_start_frame)
        frames, channels = self.config.geometry.frames_per_chunk, self.config.dims.in_dim
        shape = (1, frames, channels, *self.config.latent_hw)

        def draw() -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, self.dtype)

        latents_BFCHW = draw()
        if plan.noise_scale is not None:
            latents_BFCHW = self._mix(latents_BFCHW, plan)
        later = [draw() for _ in range(plan.num_denoise_steps - 1)]
        tensors: dict[str, torch.Tensor | None] = {"latents": latents_BFCHW}
        if later:
            tensors["renoise"] = torch.stack(later)
        return tensors

    @torch.inference_mode()
    def _mix(self, noise_BFCHW: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        """Video-to-video: the source's next latents x0, noised as flow matching does, (1 - s) x0 + s noise."""
        if self.source is None or self.vae is None or plan.noise_scale is None:
            raise CodecError("this rank's plan makes latents of a source, but it holds none or no VAE encoder")
        first = plan.current_start_frame == 0
        self.at(Doing.SOURCE)
        frames_THWC = torch.from_numpy(self.source.take(VAE_TEMPORAL * noise_BFCHW.shape[1] - (3 if first else 0)))
        self.at(Doing.PREPARE)
        pixels_BTCHW = (frames_THWC.permute(0, 3, 1, 2)[None].float() / 127.5 - 1).to(self.device, self.dtype)
        x0_BFCHW = self.vae.encode_next(pixels_BTCHW)
        scale = plan.noise_scale
        return ((1 - scale) * x0_BFCHW.float() + scale * noise_BFCHW.float()).to(noise_BFCHW.dtype)

    @torch.inference_mode()
    def anchor(self, plan: ChunkPlan) -> torch.Tensor:
        """The first context frame [1, 1, C, H, W]: re-encoded from pixels, or a latent, as the regime says."""
        return self.buffers.anchor(plan.current_start_frame, self._encode_frame)

    @torch.inference_mode()
    def decode(self, latents_BFCHW: torch.Tensor) -> torch.Tensor:
        """Phase C: pixels [1, T, 3, H, W] in [-1, 1]; both buffers move on."""
        self.remember(latents_BFCHW)
        return self.develop(latents_BFCHW)

    @torch.inference_mode()
    def remember(self, latents_BFCHW: torch.Tensor) -> None:
        """The first half of `decode`: the newest chunk's latents, which the next context is made of."""
        self.buffers.append_latents(latents_BFCHW)

    @torch.inference_mode()
    def develop(self, latents_BFCHW: torch.Tensor) -> torch.Tensor:
        """The second half, for the next F >= 1 latents of the stream: pixels [1, T, 3, H, W] in [-1, 1].

        The bits do not depend on how the stream is cut into calls.
        """
        if self.vae is None:
            raise CodecError("this rank holds no VAE decoder")
        pixels_BTCHW = self.vae.decode(latents_BFCHW)
        self.buffers.append_pixels(pixels_BTCHW)
        return pixels_BTCHW

    def reset(self) -> None:
        """Hard cut: the VAE stream and the context start anew."""
        self.buffers.reset()
        if self.vae is not None:
            self.vae.reset()

    def _context(self, plan: ChunkPlan, sent_BKCHW: torch.Tensor | None) -> torch.Tensor:
        """v1.1c brings all context frames, v1.1b the anchor; before that, this rank makes both."""
        if not self.parts.any and sent_BKCHW is not None:
            return sent_BKCHW
        anchor_BFCHW = sent_BKCHW if sent_BKCHW is not None else self.anchor(plan)
        return self.buffers.assemble(anchor_BFCHW, plan.current_start_frame)

    def _encode_frame(self, pixels_BTCHW: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            raise CodecError("this rank holds no VAE encoder")
        started = time.perf_counter()
        latent_B1CHW = self.vae.encode_frame(pixels_BTCHW)
        self.t_encode_ms = (time.perf_counter() - started) * 1e3
        return latent_B1CHW
