"""Attention and rotary positions against their formulas, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model import attention
from engine.model.attention import attend, attend_block_causal, flex_failure, resolve_backend
from engine.model.rope import RopeTables, axis_pairs, rotate, rotations
from tests.cpu.oracle import TINY, build, caches, draw, seeded_state, softmax_attention, turn


def qkv(queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, queries, 2, 16, seed=seed), draw(1, keys, 2, 16, seed=seed + 1), draw(1, keys, 2, 16, seed=seed + 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return softmax_attention(q[0].double(), k[0].double(), v[0].double(), added.double()).reshape(q.shape)


@pytest.mark.parametrize("biased", [False, True])
def test_sdpa_equals_written_out(biased: bool) -> None:
    q, k, v = qkv(12, 30)
    bias = draw(30, seed=9) if biased else None
    want = written_out(q, k, v, torch.zeros(1, 30) if bias is None else bias[None])
    assert (attend(q, k, v, bias, backend="sdpa") - want).abs().max() <= 2e-6


@pytest.mark.parametrize(("length", "block"), [(12, 4), (12, 12), (10, 4), (4, 12)])
def test_block_causal_equals_a_written_out_mask(length: int, block: int) -> None:
    q, k, v = qkv(length, length)
    of_block = torch.arange(length) // block
    mask = torch.zeros(length, length).masked_fill(of_block[None] > of_block[:, None], float("-inf"))
    got = attend_block_causal(q, k, v, block, backend="sdpa")
    assert (got - written_out(q, k, v, mask)).abs().max() <= 2e-6


def test_flex_agrees_with_sdpa_or_is_refused_with_its_reason() -> None:
    failure = flex_failure("cpu", "float32")
    if failure is not None:
        with pytest.raises(ConfigError, match="cannot run on cpu") as caught:
            resolve_backend("flex", "cpu", "float32")
        assert caught.value.evidence["failure"] == failure
        return
    assert resolve_backend("flex", "cpu", "float32")[0] == "flex"
    state, flows = seeded_state(TINY), {}
    for backend in ("sdpa", "flex"):
        dit = build(TINY, state, backend=backend)
        kv, cross = caches(TINY, tokens=4)
        with torch.inference_mode():
            for start in (0, 3, 6):
                x = draw(1, 3, TINY.in_dim, 4, 4, seed=start)
                text = draw(1, 8, TINY.text_dim, seed=1)
                flows[backend] = dit(x, torch.full((3,), 500), text, kv=kv, cross=cross, start_frame=start, bias=0.3)
    torch.testing.assert_close(flows["flex"], flows["sdpa"], rtol=0, atol=1e-5)


def test_a_backend_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise RuntimeError("\nno C++ compiler found\nlong trace")

    flex_failure.cache_clear()
    monkeypatch.setattr(attention, "_compiled_flex", no_compiler)
    try:
        with pytest.raises(ConfigError, match="cannot run on cpu in float32: no C\\+\\+ compiler found") as caught:
            resolve_backend("flex", "cpu", "float32")
        assert caught.value.code == "TP-1031"
        assert caught.value.exit_code == 77
    finally:
        flex_failure.cache_clear()


def test_wrong_numbers_are_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_failure.cache_clear()
    monkeypatch.setattr(attention, "_compiled_flex", lambda: lambda q, k, v, bias: q)
    try:
        assert "differs from sdpa's" in str(flex_failure("cpu", "float32"))
    finally:
        flex_failure.cache_clear()


def test_auto_and_sdpa_on_the_cpu() -> None:
    assert resolve_backend("sdpa", "cpu", "bfloat16") == ("sdpa", "asked for")
    effective, reason = resolve_backend("auto", "cpu", "float32")
    assert effective == "sdpa"
    assert reason.startswith("auto: ")
    with pytest.raises(ConfigError, match="known: auto, sdpa, flex"):
        resolve_backend("flash", "cpu", "float32")


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_splits_the_head_as_wan_does(head_dim: int) -> None:
    pairs = axis_pairs(head_dim)
    assert [2 * p for p in pairs] == [head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)]
    table = rotations(100, 2, 3, 4, head_dim)
    assert table.shape == (24, 1, head_dim // 2, 2)
    frame, row, column = 1, 2, 3
    token = (frame * 3 + row) * 4 + column
    size = 2 * pairs[0]
    angle = torch.tensor([(100 + frame) / 10000 ** (2 * i / size) for i in range(pairs[0])], dtype=torch.float64)
    assert (table[token, 0, : pairs[0], 0] - angle.cos()).abs().max() <= 1e-7
    size = 2 * pairs[1]
    for first, place in ((pairs[0], row), (pairs[0] + pairs[1], column)):
        angle = torch.tensor([place / 10000 ** (2 * i / size) for i in range(size // 2)], dtype=torch.float64)
        assert (table[token, 0, first : first + size // 2, 1] - angle.sin()).abs().max() <= 1e-7


def test_rotation_turns_interleaved_pairs() -> None:
    x, table = draw(1, 24, 2, 16, seed=0), rotations(5, 2, 3, 4, 16)
    want = turn(x[0].double(), torch.atan2(table[..., 1].double(), table[..., 0].double())[:, 0])
    assert (rotate(x, table)[0] - want).abs().max() <= 2e-6
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_tables_are_shared_by_the_steps_of_a_chunk_and_few() -> None:
    tables, device = RopeTables(16, keep=2), torch.device("cpu")
    first = tables.get(0, 3, 2, 2, device)
    assert tables.get(0, 3, 2, 2, device) is first
    for start in (3, 6):
        tables.get(start, 3, 2, 2, device)
    assert tables.get(0, 3, 2, 2, device) is not first
    assert torch.equal(tables.get(0, 3, 2, 2, device), first)
    with torch.device("meta"):  # built while a meta device is the default: still real numbers
        assert tables.get(9, 3, 2, 2, device).device.type == "cpu"
