"""Both attention backends on CUDA, against written-out attention; the generator against itself on the CPU."""

from __future__ import annotations

import pytest
import torch

from engine.config import ModelDims
from engine.model.attention import attend, flex_failure, resolve_backend
from engine.model.kv_cache import CrossAttnCache, KVCache
from tests.cpu.oracle import build, draw, seeded_state, softmax_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIMS = ModelDims(dim=256, ffn_dim=512, num_heads=4, num_layers=2, text_dim=64, text_len=32)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [144, 250])
def test_bias_equals_written_out(backend: str, dtype: torch.dtype, keys: int) -> None:
    q, k, v = (draw(1, n, 2, 64, seed=n).to("cuda", dtype) for n in (72, keys, keys))
    bias = torch.zeros(keys, device="cuda", dtype=dtype)
    bias[24:100] = -1.2
    want = softmax_attention(q[0].double(), k[0].double(), v[0].double(), bias.double()[None]).reshape(q.shape)
    error = (attend(q, k, v, bias, backend=backend).double() - want).abs().max().item()
    assert error <= (2e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_reports_what_runs(dtype: str) -> None:
    effective, reason = resolve_backend("auto", "cuda", dtype)
    assert effective == ("flex" if flex_failure("cuda", dtype) is None else "sdpa")
    assert reason.startswith("auto: ")


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_generator_on_cuda_equals_the_cpu(backend: str) -> None:
    state = seeded_state(DIMS)
    flows = {}
    for device, name in (("cpu", "sdpa"), ("cuda", backend)):
        dit = build(DIMS, {key: tensor.to(device) for key, tensor in state.items()}, backend=name)
        sizes = {"num_layers": 2, "heads": 4, "head_dim": 64, "dtype": torch.float32, "device": device}
        kv = KVCache(tokens_per_frame=24, window_frames=6, sink_frames=0, **sizes)
        cross = CrossAttnCache(text_len=DIMS.text_len, **sizes)
        for start in (0, 3, 6):
            x = draw(1, 3, DIMS.in_dim, 8, 12, seed=start).to(device)
            text = draw(1, 10, DIMS.text_dim, seed=99).to(device)
            step = torch.full((3,), 750, device=device)
            flow = dit(x, step, text, kv=kv, cross=cross, start_frame=start, bias=0.3)
        flows[device] = flow.cpu()
    error = (flows["cuda"] - flows["cpu"]).norm() / flows["cpu"].norm()
    assert error <= 1e-3
