"""What one rank holds, and what one generator call costs, from the configuration alone. Bytes and operations are exact
counts of the engine's own layout; nothing is measured here.

L tokens of a chunk, T tokens of the window, D model width, A this rank's share of D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config import VAE_SPATIAL, EngineConfig
from engine.model.sharding import param_shapes, shard_dim, shard_shape
from engine.plan import expected_generator_calls

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGE_SUMS_PER_BLOCK, SMALL_SUMS_PER_BLOCK = 3, 2  # of [L, D]; of one or two numbers a token


@dataclass(frozen=True)
class Sizes:
    """Of one mesh rank, in bytes; `call_*` of one generator call over a full window, on one rank.

    `call_flops` counts a multiply and an add as two. `sum_bytes` is what enters the large sums of a call, `sums` how
    many collectives it makes. `envelope_bytes` is the payload of a chunk, `result_bytes` its latents.
    """

    weights_bytes: int
    kv_bytes: int
    text_kv_bytes: int
    activation_bytes: int
    call_flops: float
    call_read_bytes: int
    sums: int
    sum_bytes: int
    envelope_bytes: int
    result_bytes: int
    calls: int

    @property
    def rank_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.text_kv_bytes + self.activation_bytes


def sizes(config: EngineConfig, tp: int) -> Sizes:
    """The sizes of one of `tp` mesh ranks; `tp` divides the model.

    Raises:
        GeometryError: it does not.
    """
    dims, geometry, item = config.dims, config.geometry, ITEM_BYTES[config.model.dtype]
    heads_width = dims.dim // tp
    tokens = tokens_per_frame(config) * geometry.frames_per_chunk
    window = tokens_per_frame(config) * geometry.window_frames
    weights = sum(math.prod(shard_shape(name, shape, tp)) * item for name, shape in param_shapes(dims).items())
    sharded = sum(
        math.prod(shard_shape(name, shape, tp))
        for name, shape in param_shapes(dims).items()
        if shard_dim(name) is not None
        and name.endswith(".weight")
        and "cross_attn.k" not in name
        and "cross_attn.v" not in name
        and len(shape) == 2
    )
    attention = 4.0 * tokens * (window + dims.text_len) * heads_width * dims.num_layers
    kv = 2 * dims.num_layers * window * heads_width * item
    text_kv = 2 * dims.num_layers * dims.text_len * heads_width * item
    latents = (
        geometry.frames_per_chunk * dims.in_dim * (geometry.height // VAE_SPATIAL) * (geometry.width // VAE_SPATIAL)
    )
    steps = len(config.schedule.denoising_step_list)
    recompute = config.schedule.recompute
    context = latents // geometry.frames_per_chunk * geometry.context_frames if recompute else 0
    return Sizes(
        weights_bytes=weights,
        kv_bytes=kv,
        text_kv_bytes=text_kv,
        activation_bytes=tokens * (4 * dims.dim + max(4 * heads_width, 2 * dims.ffn_dim // tp)) * item,
        call_flops=2.0 * tokens * sharded + attention,
        call_read_bytes=weights + kv + text_kv,
        sums=(LARGE_SUMS_PER_BLOCK + SMALL_SUMS_PER_BLOCK) * dims.num_layers if tp > 1 else 0,
        sum_bytes=LARGE_SUMS_PER_BLOCK * dims.num_layers * tokens * dims.dim * item if tp > 1 else 0,
        envelope_bytes=(latents * steps + context + dims.text_len * dims.text_dim) * item + 8 * steps,
        result_bytes=latents * item,
        calls=expected_generator_calls(recompute, steps, config.schedule.clean_pass),
    )


def tokens_per_frame(config: EngineConfig) -> int:
    return (config.geometry.height // 16) * (config.geometry.width // 16)
