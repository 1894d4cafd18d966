"""The compiled blocks on CUDA: one graph, the same collectives, the same numbers within what fused kernels round."""

from __future__ import annotations

import pytest
import torch

from engine.comm.group import Group
from engine.config import ModelDims
from engine.model.compiled import Compiled, resolve_compiler
from engine.model.kv_cache import CrossAttnCache, KVCache
from tests.cpu.oracle import build, draw, seeded_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIMS = ModelDims(dim=256, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=32)
ROWS, COLUMNS, FRAMES = 3, 4, 3


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_compiled_blocks_equal_written_ones(attention: str, dtype: torch.dtype, limit: float) -> None:
    assert resolve_compiler("inductor", "cuda") == "inductor"
    flows, counts = [], []
    for compiled in (False, True):
        mesh = Group.solo()
        run = Compiled("inductor", mesh, DIMS.num_layers) if compiled else None
        dit = build(DIMS, seeded_state(DIMS), mesh, backend=attention, run=run).to("cuda", dtype)
        common = {"num_layers": 2, "heads": 4, "head_dim": 64, "dtype": dtype, "device": "cuda"}
        kv = KVCache(**common, tokens_per_frame=ROWS * COLUMNS, window_frames=2 * FRAMES, sink_frames=0)
        cross = CrossAttnCache(**common, text_len=DIMS.text_len)
        text = draw(1, DIMS.text_len, DIMS.text_dim, seed=9).to("cuda", dtype)
        with torch.inference_mode():
            for chunk in range(4):
                x_BFCHW = draw(1, FRAMES, DIMS.in_dim, 2 * ROWS, 2 * COLUMNS, seed=chunk).to("cuda", dtype)
                timestep_F = torch.full((FRAMES,), 500, device="cuda")
                flow = dit(x_BFCHW, timestep_F, text, kv=kv, cross=cross, start_frame=chunk * FRAMES, bias=0.3)
        flows.append(flow.float())
        counts.append((mesh.ledger.count, mesh.ledger.value()))
        if compiled:
            assert (dit.run.graphs, dit.run.breaks) == (1, [])
    assert counts[0] == counts[1]
    assert (flows[0] - flows[1]).abs().max() <= limit * flows[0].abs().max()
