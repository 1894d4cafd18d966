"""A generator before its first chunk: compiled by each rank alone, then warm in lockstep, then compared.

A compiler may take minutes, and longer on one rank than on another. So no rank waits for another one's compiler inside
a collective, where a timeout would end it: first each runs its calls by itself, with the collectives left out, and the
ranks meet at the launcher's store. Only then come the same calls in lockstep. All of it is on zeros, and leaves empty
caches. The generator alone warms up: a worker without codecs has nothing else, and needs nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from engine import tripwires
from engine.comm.group import Phase
from engine.config import EngineConfig
from engine.errors import TripwireError
from engine.stage1 import Stage1

IDS = {"call_id": -1, "chunk_index": -1, "cache_epoch": -1}
REASONS_TOLD = 3


def context_sizes(config: EngineConfig) -> list[int]:
    """Frames of each recompute call that a stream may make: min(K, n F) of the n-th chunk. Where recompute is off, it
    can be turned on while the stream runs, if the window has room for it."""
    chunk, context = config.geometry.frames_per_chunk, config.geometry.context_frames
    if not config.schedule.recompute and config.geometry.window_frames < chunk + context:
        return []
    return sorted({min(context, start) for start in range(chunk, context + chunk, chunk)})


def expected_graphs(config: EngineConfig) -> int:
    """One for each number of tokens that a call may have."""
    return len({config.geometry.frames_per_chunk, *context_sizes(config)})


@torch.inference_mode()
def compile_alone(stage1: Stage1) -> float:
    """Have every graph made, without a word to the other ranks. The seconds it took."""
    started = time.monotonic()
    if stage1.config.model.compile != "off":
        with stage1.mesh.muted():
            _calls(stage1)
    return time.monotonic() - started


@torch.inference_mode()
def in_lockstep(stage1: Stage1) -> int:
    """The generator's calls on zeros, with their collectives: how many a call of the steady state makes."""
    collectives = _calls(stage1)
    agree_on_graphs(stage1)
    return collectives


def agree_on_graphs(stage1: Stage1) -> None:
    """One tiny collective, always run: no rank compiled what another did not, and no graph is broken.

    Raises:
        TripwireError: graphs or graph breaks differ over the ranks (FM-50), or are not as expected on any (FM-51).
    """
    blocks, mesh, model = stage1.blocks, stage1.mesh, stage1.config.model
    made, breaks = blocks.graphs, blocks.breaks
    rows = stage1.gather([made, len(breaks)])
    reasons = {"reasons": [f"{why} (x {times})" for why, times in Counter(breaks).most_common(REASONS_TOLD)]}
    tripwires.raise_first(
        [
            tripwires.compare("compiled graphs", "graph breaks", rows[1], mesh.members, "FM-50"),
            tripwires.compare("compiled graphs", "graphs", rows[0], mesh.members, "FM-50"),
        ],
        IDS,
        here=breaks[0] if breaks else "",
        evidence=reasons,
    )
    expected = expected_graphs(stage1.config) if model.compile != "off" else 0
    if breaks or made != expected:
        why = f", on every rank alike: {breaks[0]}" if breaks else ""
        raise TripwireError(
            f"the blocks were compiled into {made} graphs, expected {expected}, with {len(breaks)} graph breaks{why}",
            code="TP-6241",
            fm="FM-51",
            ids=IDS,
            evidence={"graphs": made, "expected": expected, "graph_breaks": len(breaks), **reasons},
            next_step="tpctl runbook show compile-regression",
        )


def facts(stage1: Stage1, compile_s: float) -> dict[str, Any]:
    """For the rank's report."""
    blocks = stage1.blocks
    return {"graphs": blocks.graphs, "graph_breaks": len(blocks.breaks), "compile_s": round(compile_s, 3)}


def _calls(stage1: Stage1) -> int:
    """Every kind of call once, then empty caches. The collectives of a call that finds its text cache filled."""
    config, gate, ledger = stage1.config, stage1.mesh.gate, stage1.mesh.ledger
    gate.phase, gate.ids = Phase.B, IDS
    frames, sizes = config.geometry.frames_per_chunk, _compiled_sizes(config)
    _call(stage1, frames, config.steps[0])
    before = ledger.count
    _call(stage1, frames, config.steps[0])
    collectives = ledger.count - before
    for size in sizes:
        stage1.kv.reset()
        _call(stage1, size, 0, recompute=True)
    stage1.kv.reset()
    stage1.cross.reset()
    gate.phase = Phase.LINK
    return collectives


def _compiled_sizes(config: EngineConfig) -> Sequence[int]:
    """Without a compiler one kind of call is as good as another."""
    return context_sizes(config) if config.model.compile != "off" else ()


def _call(stage1: Stage1, frames: int, step: float, *, recompute: bool = False) -> None:
    dims = stage1.config.dims
    weight = next(stage1.dit.parameters())
    stage1.dit(
        weight.new_zeros(1, frames, dims.in_dim, *stage1.config.latent_hw),
        torch.full((frames,), step, device=weight.device, dtype=torch.int64),
        weight.new_zeros(1, dims.text_len, dims.text_dim),
        kv=stage1.kv,
        cross=stage1.cross,
        start_frame=0,
        recompute=recompute,
    )
