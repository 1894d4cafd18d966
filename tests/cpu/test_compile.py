"""The blocks, compiled: one graph for all of them, which makes the same numbers and the same collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import warmup
from engine.blackbox import BlackBox, read_box
from engine.comm.group import Group, Phase, PhaseGate, Rank
from engine.config import EngineConfig, from_dict
from engine.errors import ConfigError
from engine.model.compiled import AsWritten, Compiled, keep_kernels_in, resolve_compiler
from engine.model.dit import DiT
from tests.cpu.oracle import TINY, build, caches, draw, seeded_state
from tests.support.ranks import run_ranks

ROWS, COLUMNS = 3, 4


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Graphs of one test are not another's."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(mesh: Group | None = None, backend: str = "aot_eager") -> DiT:
    mesh = mesh or Group.solo()
    return build(TINY, seeded_state(TINY), mesh, run=Compiled(backend, mesh, TINY.num_layers))


@torch.inference_mode()
def stream(dit: DiT, *, frames: int = 3, context: int = 0, chunks: int = 5) -> torch.Tensor:
    """The flows of a stream: two steps a chunk, its ring full after two chunks; with `context`, each is recomputed."""
    kv, cross = caches(TINY, ROWS * COLUMNS)
    flows, text = [], draw(1, TINY.text_len, TINY.text_dim, seed=99)

    def call(seed: int, size: int, step: int, start: int, *, recompute: bool = False) -> None:
        x_BFCHW = draw(1, size, TINY.in_dim, 2 * ROWS, 2 * COLUMNS, seed=seed)
        timestep_F = torch.full((size,), step)
        flow = dit(x_BFCHW, timestep_F, text, kv=kv, cross=cross, start_frame=start, bias=0.3, recompute=recompute)
        flows.append(flow.flatten())

    for chunk in range(chunks):
        start = chunk * frames
        if context and chunk:
            known = min(context, start)
            call(50 + chunk, known, 0, 0, recompute=True)
            start = known
        for step in (1000, 500):
            call(chunk, frames, step, start)
    return torch.cat(flows)


def test_one_graph_serves_every_block_step_and_chunk_bit_for_bit() -> None:
    written, one = build(TINY, seeded_state(TINY)), compiled()
    assert torch.equal(stream(written), stream(one))
    assert (one.run.graphs, one.run.breaks) == (1, [])
    assert isinstance(written.run, AsWritten)
    assert (written.run.graphs, written.run.breaks) == (0, [])


def test_a_graph_makes_the_collectives_that_the_forward_makes() -> None:
    written, one = build(TINY, seeded_state(TINY)), compiled()
    stream(written)
    stream(one)
    assert one.mesh.ledger.count == written.mesh.ledger.count > 0
    assert one.mesh.ledger.value() == written.mesh.ledger.value()


@pytest.mark.parametrize(("frames", "context", "graphs"), [(3, 3, 1), (3, 2, 2), (1, 3, 3)])
def test_another_number_of_tokens_is_another_graph_and_nothing_else_is(frames: int, context: int, graphs: int) -> None:
    written, one = build(TINY, seeded_state(TINY), frames_per_block=frames), compiled()
    one.frames_per_block = frames
    kinds = {"frames": frames, "context": context, "chunks": 6}
    assert torch.equal(stream(written, **kinds), stream(one, **kinds))
    assert one.run.graphs == graphs
    geometry = {"frames_per_chunk": frames, "context_frames": context}
    assert warmup.expected_graphs(from_dict({"geometry": geometry})) == graphs


def test_without_recompute_there_is_one_number_of_tokens_unless_it_can_be_turned_on() -> None:
    geometry = {"frames_per_chunk": 1, "window_frames": 3}
    config = from_dict({"geometry": geometry, "schedule": {"recompute": False}})
    assert warmup.context_sizes(config) == []
    assert warmup.expected_graphs(config) == 1
    assert warmup.expected_graphs(config.replace(geometry__window_frames=4)) == 3


def test_a_hidden_collective_breaks_the_graph_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "all_reduce", torch.compiler.disable(Group.all_reduce))
    one = compiled()
    stream(one, chunks=1)
    assert one.run.graphs > 1
    assert one.run.breaks
    assert all("all_reduce" in why and "\n" not in why for why in one.run.breaks)


def test_breaks_of_other_code_are_not_the_blocks() -> None:
    torch.compile(lambda x: torch._dynamo.graph_break() or x + 1, backend="eager")(torch.zeros(1))
    assert compiled().run.breaks == []


def test_a_collective_in_a_graph_is_recorded_at_the_line_that_ran_the_graph(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box", rank=0)
    mesh = Group("mesh_pg", (Rank(0), Rank(1)), Rank(0), None, PhaseGate(Phase.B, {}, box))
    dit = build(TINY, seeded_state(TINY), mesh, run=Compiled("eager", mesh, TINY.num_layers))
    kv, cross = caches(TINY, ROWS * COLUMNS, tp=2)
    cross.valid = True  # the first collective is a block's
    x_BFCHW, text = draw(1, 3, TINY.in_dim, 2 * ROWS, 2 * COLUMNS, seed=0), draw(1, 4, TINY.text_dim, seed=1)
    with pytest.raises(Exception, match=r"."):  # there is no backend: it fails, but it was entered
        dit(x_BFCHW, torch.full((3,), 500), text, kv=kv, cross=cross, start_frame=0)
    (seen,) = read_box(tmp_path / "box").collectives
    assert (seen.op, seen.file) == ("all_reduce", "engine/model/dit.py")


def test_a_muted_group_says_and_counts_nothing() -> None:
    mesh = Group("mesh_pg", (Rank(0), Rank(1)), Rank(0), None, PhaseGate(Phase.B))
    dit = build(TINY, seeded_state(TINY), mesh, run=Compiled("eager", mesh, TINY.num_layers))
    kv, cross = caches(TINY, ROWS * COLUMNS, tp=2)
    x_BFCHW, text = draw(1, 3, TINY.in_dim, 2 * ROWS, 2 * COLUMNS, seed=0), draw(1, 4, TINY.text_dim, seed=1)
    with mesh.muted():
        dit(x_BFCHW, torch.full((3,), 500), text, kv=kv, cross=cross, start_frame=0)
    assert (mesh.ledger.count, dit.run.graphs) == (0, 1)
    with pytest.raises(Exception, match=r"."):
        mesh.all_reduce(torch.zeros(1))


def test_a_compiler_that_cannot_run_is_refused_with_the_way_out() -> None:
    assert resolve_compiler("off", "cpu") == "off"
    assert resolve_compiler("aot_eager", "cpu") == "aot_eager"
    with pytest.raises(ConfigError, match=r"model\.compile 'nonsense' cannot run on cpu") as refused:
        resolve_compiler("nonsense", "cpu")
    assert (refused.value.code, refused.value.exit_code) == ("TP-1032", 77)


def test_kernels_are_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, threads = "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"
    for name in (kept, threads):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    keep_kernels_in(tmp_path / "file" / "kernels")  # cannot be made: torch's own place has to do
    assert kept not in os.environ
    keep_kernels_in(tmp_path / "kernels")
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    assert (os.environ[kept], os.environ[threads]) == (str(tmp_path / "kernels"), "1")
    keep_kernels_in(tmp_path / "other")
    assert os.environ[kept] == str(tmp_path / "kernels"), "a choice that was made before stands"


def config_of(cache: Path, **model: str) -> EngineConfig:
    return from_dict(
        {
            "model": {"cache_dir": str(cache), **model},
            "geometry": {"height": 32, "width": 32},
            "schedule": {"denoising_step_list": [1000, 500]},
            "run": {"chunks": 4, "record_latents": True},
            "sink": {"kinds": ["null"]},
        }
    )


def test_a_compiler_that_goes_missing_ends_every_rank_with_one_sentence(weights_cache: Path, tmp_path: Path) -> None:
    """No C++ compiler, as on a slim machine: found at start-up, by each rank, before anything is loaded."""
    config = config_of(weights_cache, compile="inductor")
    outcome = run_ranks(tmp_path / "run", config, environ={0: {"CXX": str(tmp_path / "none")}})
    assert outcome.exit_codes == {0: 77}
    assert outcome.reports[0]["error"]["code"] == "TP-1032"
    assert "tpctl config check --set model.compile=off" in outcome.stderr[0]


def test_what_is_compiled_in_mid_stream_is_said(weights_cache: Path, tmp_path: Path) -> None:
    """With one rank nobody differs: the stream goes on, and the chunk that was slow is named."""
    config = config_of(weights_cache, compile="eager").replace(drill__id="C-05", drill__victim_rank=0)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0}, outcome.stderr[0]
    report = outcome.reports[0]
    assert [chunk["graphs"] for chunk in report["chunks"]] == [1, 1, 2, 2]
    assert report["generator"]["graphs_in_stream"] == 1
    assert report["warnings"] == ["chunk 2 had 1 graphs compiled that the warm-up had not: it was slow"]


@pytest.mark.parametrize(("tp_plan", "tp"), [("v1_generator_only", 2), ("pp1", 2)])
def test_every_kind_of_mesh_is_compiled(tp_plan: str, tp: int, weights_cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    runs = {}
    for compiler in ("off", "aot_eager"):
        config = config_of(weights_cache, compile=compiler).replace(plan__tp_plan=tp_plan, plan__tp=tp)
        outcome = run_ranks(tmp_path / compiler, config)
        assert set(outcome.exit_codes.values()) == {0}, outcome.stderr
        runs[compiler] = load_file(tmp_path / compiler / "latents.safetensors")
        for report in outcome.reports.values():
            if report["mesh_rank"] >= 0:
                assert report["generator"]["graphs"] == (0 if compiler == "off" else 1)
                assert report["generator"]["graph_breaks"] == 0
    assert all(torch.equal(runs["off"][key], runs["aot_eager"][key]) for key in runs["off"])
