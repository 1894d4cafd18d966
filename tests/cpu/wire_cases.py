"""Small envelopes with fixed values, and frames put together by hand, for the wire tests."""

import dataclasses
from typing import Any

import torch

from engine.plan import PP0, PP1, V0, V1, V11A, V11B, ChunkPlan
from engine.wire.envelope import Envelope, Shapes
from engine.wire.frame import PayloadBuffer, PreparedFrame, prepare, rebuild
from engine.wire.header import Header, Limits, LinkState, parse_header
from engine.wire.meta import encode_plain, parse_meta

SHAPES = Shapes(
    frames_per_chunk=3, context_frames=3, channels=2, latent_h=2, latent_w=2, text_len=3, text_dim=5, dtype="bfloat16"
)
PLANS = (V0, V11A, V11B, V1, PP0, PP1)


def ramp(*shape: int) -> torch.Tensor:
    """Values 0, 1/8, 2/8 ..., all exact in bfloat16 up to 256 of them."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 256 / 8).to(torch.bfloat16).reshape(shape)


def make(
    tp_plan: str = V1, *, steps: tuple[int, ...] = (1000, 500), recompute: bool = True, **changes: Any
) -> Envelope:
    """An envelope of chunk 3 at frame 9 that passes every check; `changes` go to the plan."""
    values: dict[str, Any] = {
        "chunk_index": 3,
        "cache_epoch": 1,
        "control_epoch": 0,
        "current_start_frame": 9,
        "height": 16,
        "width": 16,
        "init_cache": False,
        "reset_kv_cache": False,
        "reset_crossattn_cache": False,
        "conditioning_embeds_updated": False,
        "kv_cache_attention_bias": 0.25,
        "do_kv_recompute": recompute,
        "denoising_step_list": steps,
        "num_denoise_steps": len(steps),
        "expected_calls": len(steps) + int(recompute),
        "base_seed": 42,
    }
    plan = ChunkPlan(**{**values, **changes})
    tensors: dict[str, torch.Tensor | None] = {"denoising_step_list": torch.tensor(steps)}
    if tp_plan != V0:
        tensors["conditioning_embeds"] = ramp(1, 3, 5)
    if tp_plan in (V11B, V1, PP0, PP1):
        tensors["latents"] = ramp(1, 3, 2, 2, 2)
        if len(steps) > 1:
            tensors["renoise"] = ramp(len(steps) - 1, 1, 3, 2, 2, 2)
        frames = 1 if tp_plan == V11B else min(3, plan.current_start_frame)
        tensors["context_frames"] = ramp(1, frames, 2, 2, 2) if recompute else None
    return Envelope(tp_plan, plan, "a fox över snö" if tp_plan == V0 else None, tensors)


def change(envelope: Envelope, **tensors: Any) -> Envelope:
    """With tensors replaced; `...` removes one."""
    held = {**envelope.tensors, **tensors}
    return dataclasses.replace(envelope, tensors={k: v for k, v in held.items() if v is not ...})


def link() -> LinkState:
    return LinkState(last_call_id=6, last_chunk_index=2, cache_epoch=1, control_epoch=0)


def send(envelope: Envelope, *, limits: Limits | None = None, buffer: PayloadBuffer | None = None) -> PreparedFrame:
    return prepare(
        envelope,
        call_id=7,
        link=link(),
        shapes=SHAPES,
        limits=limits or Limits(),
        buffer=buffer or PayloadBuffer(),
    )


def receive(header_bytes: bytes, meta: bytes, payload: torch.Tensor | None, tp_plan: str = V1) -> Envelope:
    """What a mesh rank does with the three messages of a frame."""
    state = link()
    header = parse_header(header_bytes, state, Limits())
    return rebuild(header, parse_meta(header, meta), payload, shapes=SHAPES, tp_plan=tp_plan, link=state)


def forge(frame: PreparedFrame, meta: dict[str, Any], **words: int) -> tuple[bytes, bytes]:
    """Header and meta of a sender without preflight: altered, yet with a checksum that holds."""
    raw = encode_plain(meta)
    header: Header = dataclasses.replace(frame.header, **words).seal(raw)
    return header.pack(), raw
