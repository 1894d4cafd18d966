"""Builds one mesh rank's generator: the DiT on its shard of the checkpoint, and its caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.assets import generator_checkpoint
from engine.comm.group import Group
from engine.config import EngineConfig
from engine.model.compiled import blocks
from engine.model.dit import DiT
from engine.model.kv_cache import CrossAttnCache, KVCache
from engine.model.sharding import shard_dim
from engine.model.weights import WeightsReport, fingerprint, load_shard


@dataclass(frozen=True)
class Generator:
    """`replicated_fingerprint` covers the parameters that every mesh rank must hold alike."""

    dit: DiT
    kv: KVCache
    cross: CrossAttnCache
    weights: WeightsReport
    replicated_fingerprint: str


def build_generator(config: EngineConfig, mesh: Group, backend: str, device: str) -> Generator:
    """Load this rank's slices straight onto the device; nothing is initialised twice.

    Raises:
        WeightsError: missing, truncated or foreign checkpoint, with everything that is wrong with it.
    """
    dims, geometry = config.dims, config.geometry
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    state, weights = load_shard(
        generator_checkpoint(config), dims, int(mesh.group_rank), mesh.size, device=device, dtype=dtype
    )
    with torch.device("meta"):
        run = blocks(config.model.compile, mesh, dims.num_layers)
        dit = DiT(dims, mesh, backend=backend, frames_per_block=geometry.frames_per_chunk, run=run)
    dit.load_state_dict(state, strict=True, assign=True)
    dit.requires_grad_(False).eval()
    replicated = fingerprint({name: tensor for name, tensor in state.items() if shard_dim(name) is None})
    heads = dims.num_heads // mesh.size
    kv = KVCache(
        num_layers=dims.num_layers,
        heads=heads,
        head_dim=dims.head_dim,
        tokens_per_frame=config.tokens_per_frame,
        window_frames=geometry.window_frames,
        sink_frames=geometry.sink_frames,
        dtype=dtype,
        device=device,
    )
    cross = CrossAttnCache(
        num_layers=dims.num_layers,
        heads=heads,
        head_dim=dims.head_dim,
        text_len=dims.text_len,
        dtype=dtype,
        device=device,
    )
    return Generator(dit, kv, cross, weights, replicated)
