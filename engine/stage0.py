"""Phases A and C on rank 0: decides each chunk's plan, makes its envelope, and turns the result into pixels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, TripwireError
from engine.materials import Materials
from engine.plan import ChunkPlan, expected_generator_calls
from engine.timeline import Event, Timeline
from engine.wire.envelope import CARRIES, CARRIES_ANCHOR_ONLY, CARRIES_PROMPT, Envelope


@dataclass(frozen=True)
class Control:
    """What the operator steers. `epoch` is the contract's `control_epoch`: + 1 for each change."""

    prompt: str
    bias: float
    recompute: bool
    epoch: int = 0


@dataclass(frozen=True)
class Next:
    """Whether the next chunk begins a stream of its own, and whether it needs the context of all before it."""

    cut: bool
    recompute: bool


class Stage0:
    """The stream's state on rank 0: position, epochs, control, and the materials of phases A and C.

    `current_start_frame` is that of the next chunk, until a cut sets it back.
    """

    def __init__(self, config: EngineConfig, timeline: Timeline, materials: Materials) -> None:
        self.config = config
        self.timeline = timeline
        self.materials = materials
        first = timeline.at(0)
        if first is None or first.prompt is None:
            raise ConfigError("the timeline has no prompt at chunk 0", code="TP-1023")
        self.control = Control(first.prompt, config.schedule.kv_cache_attention_bias, config.schedule.recompute)
        self.cache_epoch = 0
        self.chunk_index = -1
        self.current_start_frame = 0
        self._in_flight: dict[int, ChunkPlan] = {}

    def step(self) -> Envelope:
        """Phase A of the next chunk: a complete envelope, every tensor of phase B in it."""
        chunk_index = self.chunk_index + 1
        event = self.timeline.at(chunk_index) or Event(chunk_index)
        before, self.control = self.control, self._steer(event)
        init_cache = chunk_index == 0 or event.cut
        if event.cut and chunk_index > 0:
            self.cache_epoch += 1
        if init_cache:
            self.current_start_frame = 0
        new_prompt = chunk_index == 0 or self.control.prompt != before.prompt
        plan = self._plan(chunk_index, init_cache=init_cache, new_prompt=new_prompt)
        bare = Envelope(self.config.plan.tp_plan, plan, self.control.prompt, self._step_list(plan))
        envelope = self.materials.complete(bare)
        self.chunk_index = chunk_index
        self.current_start_frame += self.config.geometry.frames_per_chunk
        self._in_flight[chunk_index] = plan
        return envelope

    def source_ended(self) -> bool:
        """Whether there is nothing left to make another chunk of; never without a source video."""
        return self.materials.source is not None and self.materials.source.ended

    def next_chunk(self) -> Next:
        """What phase A of the next chunk will be, decided from the timeline alone."""
        event = self.timeline.at(self.chunk_index + 1) or Event(self.chunk_index + 1)
        begins = event.cut or self.chunk_index < 0
        return Next(cut=begins, recompute=not begins and self._steer(event).recompute)

    def for_link(self, envelope: Envelope) -> Envelope:
        """The part of a complete envelope that its plan carries; the workers derive the rest."""
        tp_plan = envelope.tp_plan
        tensors = {key: tensor for key, tensor in envelope.tensors.items() if key in CARRIES[tp_plan]}
        context_BKCHW = tensors.get("context_frames")
        if tp_plan in CARRIES_ANCHOR_ONLY and context_BKCHW is not None:
            tensors["context_frames"] = context_BKCHW[:, :1]
        prompt = envelope.prompt if tp_plan in CARRIES_PROMPT else None
        return dataclasses.replace(envelope, prompt=prompt, tensors=tensors)

    def accept(self, latents_BFCHW: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        """Phase C: decode the result of the chunk in flight. Returns uint8 pixels [T, H, W, 3] on the CPU.

        Raises:
            TripwireError: a result nobody asked for.
        """
        self.remember(latents_BFCHW, plan)
        return self.develop(latents_BFCHW)

    def remember(self, latents_BFCHW: torch.Tensor, plan: ChunkPlan) -> None:
        """The first half of `accept`: the result is part of the stream from here on, and the next context.

        Raises:
            TripwireError: a result nobody asked for.
        """
        self.forget(plan)
        self.materials.remember(latents_BFCHW)

    def forget(self, plan: ChunkPlan) -> None:
        """A chunk is no longer in flight. Raises TripwireError if it was not."""
        if self._in_flight.get(plan.chunk_index) != plan:
            raise TripwireError(f"a result for chunk {plan.chunk_index} came, which is not in flight", fm="FM-10")
        del self._in_flight[plan.chunk_index]

    def latents_to_anchor(self) -> int:
        """Latents of the newest chunk to decode before `step` can make the next anchor; see `ContextBuffers`."""
        return self.materials.buffers.latents_to_anchor(self.current_start_frame)

    def develop(self, latents_BFCHW: torch.Tensor) -> torch.Tensor:
        """The second half of `accept`, for the next latents of the stream: uint8 pixels [T, H, W, 3] on the CPU."""
        pixels_BTCHW = self.materials.develop(latents_BFCHW)
        unit_THWC = (pixels_BTCHW[0].float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (unit_THWC * 255).round().to(torch.uint8).cpu().contiguous()

    def _steer(self, event: Event) -> Control:
        """The control after this event; an event that changes nothing leaves the epoch alone."""
        now = self.control
        changed = dataclasses.replace(
            now,
            prompt=event.prompt if event.prompt is not None else now.prompt,
            bias=event.bias if event.bias is not None else now.bias,
            recompute=event.recompute if event.recompute is not None else now.recompute,
        )
        return changed if changed == now else dataclasses.replace(changed, epoch=now.epoch + 1)

    def _plan(self, chunk_index: int, *, init_cache: bool, new_prompt: bool) -> ChunkPlan:
        schedule, geometry = self.config.schedule, self.config.geometry
        do_kv_recompute = self.control.recompute and self.current_start_frame > 0
        steps = self.config.steps
        return ChunkPlan(
            chunk_index=chunk_index,
            cache_epoch=self.cache_epoch,
            control_epoch=self.control.epoch,
            current_start_frame=self.current_start_frame,
            height=geometry.height,
            width=geometry.width,
            init_cache=init_cache,
            reset_kv_cache=init_cache,
            reset_crossattn_cache=init_cache or new_prompt,
            conditioning_embeds_updated=new_prompt,
            kv_cache_attention_bias=self.control.bias,
            do_kv_recompute=do_kv_recompute,
            denoising_step_list=steps,
            num_denoise_steps=len(steps),
            expected_calls=expected_generator_calls(do_kv_recompute, len(steps), schedule.clean_pass),
            base_seed=schedule.base_seed,
            noise_scale=self.config.noise_scale,
            clean_pass=schedule.clean_pass,
        )

    def _step_list(self, plan: ChunkPlan) -> dict[str, torch.Tensor | None]:
        steps = torch.tensor(plan.denoising_step_list, dtype=torch.int64, device=self.materials.device)
        return {"denoising_step_list": steps}
