"""Real ranks: every plan against the single process, and every early end with its exit code and sentence."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.config import EngineConfig, from_dict
from engine.plan import V0, V1, V11A, V11B
from tests.support.ranks import Outcome, free_port, run_ranks

TIMELINE = """
[[event]]
at_chunk = 0
prompt = "a red fox in the snow"
[[event]]
at_chunk = 1
prompt = "the same fox at night"
bias = 0.6
[[event]]
at_chunk = 3
recompute = false
[[event]]
at_chunk = 4
recompute = true
[[event]]
at_chunk = 5
cut = true
"""


def make_config(cache: Path, tmp_path: Path, **dotted: object) -> EngineConfig:
    timeline = tmp_path / "timeline.toml"
    timeline.write_text(TIMELINE)
    base = from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "run": {"chunks": 6, "timeline": str(timeline), "record_latents": True},
            "sink": {"kinds": ["null"]},
        }
    )
    return base.replace(**dotted)


@pytest.fixture(scope="module")
def reference(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, all phases: what every plan must equal."""
    path = tmp_path_factory.mktemp("reference")
    outcome = run_ranks(path / "run", make_config(weights_cache, path, plan__tp_plan=V0))
    assert outcome.exit_codes == {0: 0}, outcome.stderr[0]
    return outcome


@pytest.mark.parametrize("tp_plan", [V0, V11A, V11B, V1])
def test_plan_equals_the_single_process(tp_plan: str, reference: Outcome, weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp_plan=tp_plan, plan__tp=2)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    ours = load_file(outcome.run_dir / "latents.safetensors")
    theirs = load_file(reference.run_dir / "latents.safetensors")
    assert sorted(ours) == sorted(theirs)
    for key, latents in theirs.items():
        assert (ours[key] - latents).abs().max() <= 1e-4 * latents.abs().max(), key
    leader, worker = outcome.reports[0], outcome.reports[1]
    assert [c["input_digest_i64"] for c in leader["chunks"]] == [c["input_digest_i64"] for c in worker["chunks"]]
    assert [c["observed_generator_calls"] for c in worker["chunks"]] == [4, 5, 5, 4, 5, 4]
    assert [c["cache_epoch"] for c in worker["chunks"]] == [0, 0, 0, 0, 0, 1]
    assert [c["start_frame"] for c in worker["chunks"]] == [0, 3, 3, 6, 3, 0]
    # No codec at all on a worker of v1.1c. (Elsewhere diffusers brings transformers along.)
    assert worker["imported"] == {"transformers": tp_plan != V1, "diffusers": tp_plan != V1}
    assert leader["account"] == {"accepted": 6, "emitted": 6, "dropped": 0, "abandoned": 0}


def test_a_hard_cut_with_the_same_prompt_repeats_the_first_chunk(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path)
    Path(config.run.timeline).write_text(
        '[[event]]\nat_chunk = 0\nprompt = "a boat"\n[[event]]\nat_chunk = 2\ncut = true\n'
    )
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0}, outcome.stderr[0]
    pixels = load_file(outcome.run_dir / "pixels.safetensors")
    assert pixels["chunk_00000"].equal(pixels["chunk_00002"])
    assert not pixels["chunk_00001"].equal(pixels["chunk_00002"])
    assert pixels["chunk_00000"].shape[0] == 9
    assert pixels["chunk_00001"].shape[0] == 12


def test_a_rank_that_never_joins_is_named(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp=2, comm__join_timeout_s=2.0)
    outcome = run_ranks(tmp_path / "run", config, ranks=[0])
    assert outcome.exit_codes == {0: 75}
    assert "rank 1 did not reach 'join' within 2 s" in outcome.stderr[0]
    assert outcome.reports[0]["error"]["evidence"]["missing"] == [1]


def test_a_port_in_use_is_said(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, comm__join_timeout_s=2.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        outcome = run_ranks(tmp_path / "run", config, port=taken.getsockname()[1])
    assert outcome.exit_codes == {0: 75}
    assert "TP-3202" in outcome.stderr[0]


@pytest.mark.parametrize(
    ("change", "key", "fm"),
    [
        ({"plan__tp_plan": V11A}, "config.plan.tp_plan", "FM-01"),
        ({"tripwires__output_digest_every": 0}, "config.tripwires.output_digest_every", "FM-03"),
    ],
)
def test_ranks_that_differ_end_before_any_chunk(
    change: dict[str, object], key: str, fm: str, weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp=2)
    outcome = run_ranks(tmp_path / "run", config, configs={1: config.replace(**change)})
    assert outcome.exit_codes == {0: 75, 1: 75}, outcome.stderr
    for report in outcome.reports.values():
        assert report["error"]["fm"] == fm
        assert set(report["error"]["evidence"]["differences"]) == {key}
        assert report["chunks"] == []


def test_another_thread_count_is_a_difference(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp=2)
    outcome = run_ranks(tmp_path / "run", config, environ={1: {"OMP_NUM_THREADS": "2"}})
    assert outcome.exit_codes == {0: 75, 1: 75}
    assert "environment.OMP_NUM_THREADS: rank 0 = 1, rank 1 = 2" in outcome.stderr[0]


def test_a_missing_checkpoint_says_which_file_is_expected(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, model__checkpoint=str(tmp_path / "nowhere"))
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 77}
    assert str(tmp_path / "nowhere") in outcome.stderr[0]
    (error,) = outcome.events(0, "error")
    assert str(tmp_path / "nowhere") in error["message"]
    assert outcome.events(0, "state")[-1]["data"]["state"] == "aborted"


def test_an_unwritable_sink_ends_rank_0_and_drains_the_others(weights_cache: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    config = make_config(weights_cache, tmp_path, plan__tp=2, sink__kinds=["mp4"], sink__directory=str(in_the_way))
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 70, 1: 0}, outcome.stderr
    assert str(in_the_way) in outcome.stderr[0]


def test_the_launcher_must_start_as_many_ranks_as_the_plan_needs(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path)
    outcome = run_ranks(tmp_path / "run", config, world_size=2, port=free_port())
    assert outcome.exit_codes == {0: 77, 1: 77}
    assert "needs 1 ranks, the launcher started 2" in outcome.stderr[0]


def test_a_meta_too_long_for_the_first_message_travels_in_its_own(weights_cache: Path, tmp_path: Path) -> None:
    """v0 carries the prompt itself. It is also longer than the text encoder takes, and both ranks say so."""
    config = make_config(weights_cache, tmp_path, plan__tp_plan=V0, plan__tp=2, run__chunks=1)
    Path(config.run.timeline).write_text(f'[[event]]\nat_chunk = 0\nprompt = "{"a boat on a lake " * 300}"\n')
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    for report in outcome.reports.values():
        assert "longer than 32 tokens" in report["warnings"][0]
