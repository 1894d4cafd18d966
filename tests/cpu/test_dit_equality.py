"""The generator against diffusers' Wan, against itself in one pass, and against a plain float64 version."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from engine.comm.group import Group
from engine.errors import GeometryError, TripwireError
from engine.model.dit import DiT, sinusoid
from engine.model.sharding import param_shapes, shard_shape
from tests.cpu.oracle import TINY, Oracle, build, caches, draw, seeded_state

ROWS, COLUMNS = 3, 4
TOKENS = ROWS * COLUMNS
STEPS = (1000, 750, 500, 250)

TO_DIFFUSERS = (
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.modulation", "scale_shift_table"),
    (r"^head\.head", "proj_out"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.(self|cross)_attn\.([qkv])\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)


def diffusers_name(name: str) -> str:
    for pattern, replacement in TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


def latents(seed: int, frames: int = 3) -> torch.Tensor:
    return draw(1, frames, TINY.in_dim, 2 * ROWS, 2 * COLUMNS, seed=seed)


def text(seed: int, length: int = TINY.text_len) -> torch.Tensor:
    return draw(1, length, TINY.text_dim, seed=seed)


def at(step: int, frames: int = 3) -> torch.Tensor:
    return torch.full((frames,), step)


class Angles(torch.nn.Module):
    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        return sinusoid(timestep, TINY.freq_dim).float()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return seeded_state(TINY)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parameters_are_those_of_the_checkpoint_cut_for_the_mesh(size: int) -> None:
    mesh = Group("mesh_pg", tuple(range(size)), 0, None)
    with torch.device("meta"):
        dit = DiT(TINY, mesh)
    found = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert found == {name: shard_shape(name, shape, size) for name, shape in param_shapes(TINY).items()}
    assert not any(parameter.requires_grad for parameter in dit.parameters())


@pytest.mark.parametrize(("step", "exact_angles"), [(250, False), (437, False), (1000, True)])
def test_first_chunk_equals_diffusers(state: dict[str, torch.Tensor], step: int, exact_angles: bool) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    rival = WanTransformer3DModel(
        num_attention_heads=TINY.num_heads,
        attention_head_dim=TINY.head_dim,
        in_channels=TINY.in_dim,
        out_channels=TINY.out_dim,
        text_dim=TINY.text_dim,
        freq_dim=TINY.freq_dim,
        ffn_dim=TINY.ffn_dim,
        num_layers=TINY.num_layers,
        eps=TINY.eps,
    )
    rival.load_state_dict({diffusers_name(name): tensor for name, tensor in state.items()}, strict=True)
    if exact_angles:
        # diffusers takes the timestep's angles in float32, which at 1000 is off by 6e-5 rad and shows as 2e-5 in the
        # flow; Wan takes them in float64. Everything else stays theirs.
        rival.condition_embedder.timesteps_proj = Angles()
    x, cond = latents(1), text(2)
    with torch.no_grad():
        want = rival(x.transpose(1, 2), torch.tensor([step]), cond, return_dict=False)[0].transpose(1, 2)
    kv, cross = caches(TINY, TOKENS)
    flow = build(TINY, state)(x, at(step), cond, kv=kv, cross=cross, start_frame=0)
    assert flow.shape == x.shape
    assert want.abs().max() > 0.5
    assert (flow - want).abs().max() <= 1e-5


def test_cached_chunk_equals_the_same_tokens_in_one_block_causal_pass(state: dict[str, torch.Tensor]) -> None:
    dit, x, cond = build(TINY, state), latents(3, frames=6), text(4)
    steps = torch.tensor([0, 0, 0, 750, 750, 750])
    kv, cross = caches(TINY, TOKENS)
    whole = dit(x, steps, cond, kv=kv, cross=cross, start_frame=0, recompute=True)
    kv, cross = caches(TINY, TOKENS)
    first = dit(x[:, :3], steps[:3], cond, kv=kv, cross=cross, start_frame=0)
    second = dit(x[:, 3:], steps[3:], cond, kv=kv, cross=cross, start_frame=3)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=5e-6)
    alone = dit(x[:, 3:], steps[3:], cond, kv=caches(TINY, TOKENS)[0], cross=cross, start_frame=0)
    assert (alone - second).abs().max() > 1e-3, "the past must matter, or the comparison above says nothing"


@pytest.mark.parametrize(("window", "sink", "bias"), [(6, 0, 1.0), (6, 0, 0.3), (7, 1, 0.3), (5, 2, 0.5)])
def test_rolling_window_equals_written_out_attention(
    state: dict[str, torch.Tensor], window: int, sink: int, bias: float
) -> None:
    dit, oracle = build(TINY, state), Oracle(TINY, state, window, sink)
    kv, cross = caches(TINY, TOKENS, window, sink)
    cond, start = text(5), 0
    for chunk in range(7):
        if chunk == 5:  # a hard cut
            kv.reset()
            oracle.reset()
            start = 0
        for step in (1000, 500):
            x = latents(100 * chunk + step)
            flow = dit(x, at(step), cond, kv=kv, cross=cross, start_frame=start, bias=bias)
            want = oracle(x, at(step), cond, start, bias)
            assert (flow - want).abs().max() <= 1e-5, f"chunk {chunk}, step {step}"
        start += 3
        assert kv.global_end_index == [start * TOKENS] * TINY.num_layers
        assert kv.local_end_index == [min(start, window) * TOKENS] * TINY.num_layers


@pytest.mark.parametrize(("context", "block", "window"), [(3, 3, 6), (1, 3, 6), (2, 1, 6), (5, 3, 9)])
def test_recompute_equals_written_out_attention(
    state: dict[str, torch.Tensor], context: int, block: int, window: int
) -> None:
    dit = build(TINY, state, frames_per_block=block)
    oracle = Oracle(TINY, state, window, 0, block)
    kv, cross = caches(TINY, TOKENS, window)
    for chunk in range(4):
        cond = text(10 + chunk, length=TINY.text_len - 5 * chunk)
        cross.reset()
        if chunk:
            x = latents(chunk, frames=context)
            flow = dit(
                x, at(0, context), cond, kv=kv, cross=cross, start_frame=0, bias=0.3, recompute=True
            )  # bias must be ignored here
            assert (flow - oracle(x, at(0, context), cond, 0, recompute=True)).abs().max() <= 1e-5
            assert kv.global_end_index == kv.local_end_index == [context * TOKENS] * TINY.num_layers
        start = min(3 * chunk, context)
        for step in STEPS[:2]:
            x = latents(100 * chunk + step)
            flow = dit(x, at(step), cond, kv=kv, cross=cross, start_frame=start, bias=0.3)
            assert (flow - oracle(x, at(step), cond, start, 0.3)).abs().max() <= 1e-5, f"chunk {chunk}, step {step}"


def test_text_is_padded_with_zeros_and_read_only_when_the_cache_is_empty(state: dict[str, torch.Tensor]) -> None:
    dit, x, short = build(TINY, state), latents(6), text(7, length=5)
    padded = torch.cat((short, torch.zeros(1, TINY.text_len - 5, TINY.text_dim)), 1)
    kv, cross = caches(TINY, TOKENS)

    def call(cond: torch.Tensor) -> torch.Tensor:
        return dit(x, at(500), cond, kv=kv, cross=cross, start_frame=0)

    first = call(short)
    assert torch.equal(call(text(8)), first), "a valid cache answers for the text"
    cross.reset()
    assert torch.equal(call(padded), first)
    cross.reset()
    assert not torch.allclose(call(text(8)), first, atol=1e-3)


def test_hard_cut_repeats_the_first_chunk_exactly(state: dict[str, torch.Tensor]) -> None:
    dit, cond = build(TINY, state), text(9)
    kv, cross = caches(TINY, TOKENS)
    first = dit(latents(1), at(750), cond, kv=kv, cross=cross, start_frame=0)
    for chunk in range(1, 4):
        dit(latents(chunk), at(750), cond, kv=kv, cross=cross, start_frame=3 * chunk)
    kv.reset()
    cross.reset()
    assert torch.equal(dit(latents(1), at(750), cond, kv=kv, cross=cross, start_frame=0), first)


def test_timesteps_apply_frame_by_frame(state: dict[str, torch.Tensor]) -> None:
    x, cond, mixed = latents(1), text(2), torch.tensor([1000, 500, 0])
    kv, cross = caches(TINY, TOKENS)
    flow = build(TINY, state)(x, mixed, cond, kv=kv, cross=cross, start_frame=0)
    assert (flow - Oracle(TINY, state, 6, 0)(x, mixed, cond, 0)).abs().max() <= 1e-5


def test_collectives_per_forward(state: dict[str, torch.Tensor]) -> None:
    mesh = Group.solo()
    dit = build(TINY, state, mesh)
    kv, cross = caches(TINY, TOKENS)
    counts = []
    for start, recompute in ((0, False), (0, False), (3, False), (0, True), (3, False)):
        before = mesh.ledger.count
        dit(latents(1), at(500), text(2), kv=kv, cross=cross, start_frame=start, bias=0.3, recompute=recompute)
        counts.append(mesh.ledger.count - before)
    cold, warm = dit.collectives_per_call(rebuilds_text=True), dit.collectives_per_call()
    assert (cold, warm) == (5 * TINY.num_layers + 1, 5 * TINY.num_layers)
    assert counts == [cold, warm, warm, warm, warm]


def test_bfloat16_stays_near_float32(state: dict[str, torch.Tensor]) -> None:
    half = build(TINY, {name: tensor.bfloat16() for name, tensor in state.items()})
    kv, cross = caches(TINY, TOKENS, dtype=torch.bfloat16)
    oracle = Oracle(TINY, {name: tensor.bfloat16() for name, tensor in state.items()}, 6, 0)
    for start in (0, 3, 6):
        x, cond = latents(start).bfloat16(), text(2).bfloat16()
        flow = half(x, at(500), cond, kv=kv, cross=cross, start_frame=start, bias=0.3)
        want = oracle(x, at(500), cond, start, 0.3)
        assert flow.dtype == torch.bfloat16
        assert ((flow.double() - want).norm() / want.norm()).item() < 0.03


def test_what_does_not_fit_is_refused_before_the_first_collective(state: dict[str, torch.Tensor]) -> None:
    mesh = Group.solo()
    dit = build(TINY, state, mesh)
    kv, cross = caches(TINY, TOKENS)
    wrong_grid = draw(1, 3, TINY.in_dim, 4, 4, seed=0)
    for x, t, cond in (
        (wrong_grid, at(500), text(1)),
        (latents(1)[:, :, :8], at(500), text(1)),
        (latents(1), at(500, frames=2), text(1)),
        (latents(1), at(500), text(1, length=TINY.text_len + 1)),
        (latents(1), at(500), text(1)[..., :-1]),
    ):
        with pytest.raises(GeometryError):
            dit(x, t, cond, kv=kv, cross=cross, start_frame=0)
    with pytest.raises(TripwireError, match="ends at frame 0"):
        dit(latents(1), at(500), text(1), kv=kv, cross=cross, start_frame=3)
    other = dataclasses.replace(TINY, num_layers=3)
    with pytest.raises(GeometryError, match="KV cache has"):
        dit(latents(1), at(500), text(1), kv=caches(other, TOKENS)[0], cross=cross, start_frame=0)
    assert mesh.ledger.count == 0
    assert not cross.valid


def test_a_mesh_that_does_not_divide_is_refused() -> None:
    with pytest.raises(GeometryError, match=r"at most 3, these can be: 1, 2"):
        DiT(TINY, Group("mesh_pg", (0, 1, 2), 0, None))
