"""The plan of chunk n of a plain stream, for benchmarks of what carries it."""

from __future__ import annotations

from engine.plan import ChunkPlan, expected_generator_calls
from engine.wire.envelope import Shapes


def chunk_plan(chunk: int, shapes: Shapes, steps: tuple[int, ...]) -> ChunkPlan:
    """Recompute from the second chunk on, one prompt, no cut."""
    first = chunk == 0
    return ChunkPlan(
        chunk_index=chunk,
        cache_epoch=0,
        control_epoch=0,
        current_start_frame=shapes.frames_per_chunk * chunk,
        height=shapes.latent_h * 8,
        width=shapes.latent_w * 8,
        init_cache=first,
        reset_kv_cache=first,
        reset_crossattn_cache=first,
        conditioning_embeds_updated=first,
        kv_cache_attention_bias=0.3,
        do_kv_recompute=not first,
        denoising_step_list=steps,
        num_denoise_steps=len(steps),
        expected_calls=expected_generator_calls(not first, len(steps)),
        base_seed=42,
    )
