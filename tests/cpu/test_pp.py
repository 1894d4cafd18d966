"""Real ranks of pp0 and pp1: against the single process, bit for bit; hard cuts in flight; ends in good order."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine.config import EngineConfig, from_dict
from engine.measures import overlap, send_after_decode, stages
from engine.plan import V0
from tests.support.ranks import Outcome, run_ranks, start_ranks

TIMELINE = """
[[event]]
at_chunk = 0
prompt = "a red fox in the snow"
[[event]]
at_chunk = 3
prompt = "the same fox at night"
bias = 0.6
[[event]]
at_chunk = 5
cut = true
"""


def make_config(cache: Path, path: Path, **dotted: Any) -> EngineConfig:
    timeline = path / "timeline.toml"
    if not timeline.exists():
        timeline.write_text(TIMELINE)
    base = from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "run": {"chunks": 8, "timeline": str(timeline), "record_latents": True},
            "sink": {"kinds": ["null"]},
            "pipeline": {"cut": "finish"},
        }
    )
    return base.replace(**dotted)


R1 = {"schedule__recompute": False}
R0A: dict[str, Any] = {}
DECODE_FIRST = {"pipeline__anchor_first": False}
R0 = {"schedule__anchor": "latent"}
OTHER_SIZES = {"geometry__frames_per_chunk": 3, "geometry__context_frames": 2}


@pytest.fixture(scope="module")
def references(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process, all phases; made once for each regime that a test asks for."""
    made: dict[str, Outcome] = {}

    def reference(changes: dict[str, Any]) -> Outcome:
        changes = {key: value for key, value in changes.items() if not key.startswith("pipeline")}
        key = repr(sorted(changes.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("reference")
            made[key] = run_ranks(path / "run", make_config(weights_cache, path, plan__tp_plan=V0, **changes))
            assert made[key].exit_codes == {0: 0}, made[key].stderr[0]
        return made[key]

    return reference


def compare(ours: Outcome, theirs: Outcome, tolerance: float = 0.0) -> list[str]:
    """Latents and, at tolerance 0, pixels of every chunk that was emitted; returns their names."""
    a, b = (load_file(outcome.run_dir / "latents.safetensors") for outcome in (ours, theirs))
    for key, latents in a.items():
        assert (latents - b[key]).abs().max() <= tolerance * b[key].abs().max(), key
    if not tolerance:
        a, b = (load_file(outcome.run_dir / "pixels.safetensors") for outcome in (ours, theirs))
        assert all(pixels.equal(b[key]) for key, pixels in a.items())
    return sorted(a)


@pytest.mark.parametrize(
    ("plan", "changes"),
    [("pp0", R1), ("pp0", R0A), ("pp0", DECODE_FIRST), ("pp0", R0), ("pp1", R0A), ("pp1", R1), ("pp0", OTHER_SIZES)],
    ids=["pp0-R1", "pp0-R0a", "pp0-R0a-decode-first", "pp0-R0", "pp1-R0a", "pp1-R1", "pp0-K2"],
)
def test_equals_the_single_process_bit_for_bit(
    plan: str, changes: dict[str, Any], references: Any, weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp_plan=plan, **changes)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert len(compare(outcome, references(changes))) == 8
    stage0, leader = outcome.reports[0], outcome.reports[1]
    assert stage0["account"] == {"accepted": 8, "emitted": 8, "dropped": 0, "abandoned": 0}
    assert (stage0["role"], leader["role"]) == ("stage0", "stage1+leader")
    assert leader["imported"] == {"transformers": False, "diffusers": False}
    assert stage0["effective"]["regime"] == config.regime
    assert [c["call_id"] for c in stage0["chunks"]] == [c["call_id"] for c in leader["chunks"]]
    assert [c["chunk_index"] for c in stage0["chunks"]] == list(range(8))
    assert [c["cache_epoch"] for c in stage0["chunks"]] == [0] * 5 + [1] * 3
    assert [c["control_epoch"] for c in stage0["chunks"]] == [0] * 3 + [1] * 5
    if config.regime == "R0a":
        late = [c["latents_before_feed"] for c in stage0["chunks"]][1:4]
        frames, context = config.geometry.frames_per_chunk, config.geometry.context_frames
        assert late == [frames - context + 1 if config.pipeline.anchor_first else frames] * 3
    assert stage0["generator"]["overlap"]["chunks"] == 5
    assert all(0 <= c["d_in"] <= 2 and 0 <= c["d_out"] <= 2 for c in stage0["chunks"])
    assert all(1 <= stage0["generator"][f"{queue}_most"] <= 2 for queue in ("d_in", "d_out"))
    # An anchor from pixels costs its decode and its encoding; without one, nothing waits.
    costs = [c["t_anchor_ms"] > 0 for c in stage0["chunks"]][1:4]
    assert costs == [config.regime == "R0a"] * 3
    signature = send_after_decode(stage0["chunks"])
    assert signature is None or not signature.found, signature


def test_a_send_after_decode_costs_time_alone_and_is_known_by_its_signature(
    references: Any, weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp_plan="pp0", drill__id="O-02", **R1)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert len(compare(outcome, references(R1))) == 8
    # No envelope was under way while a chunk was decoded, so the mesh waited at least as long as that took.
    chunks = outcome.reports[0]["chunks"]
    assert all(after["tA0_ms"] >= before["tEmit_ms"] for before, after in itertools.pairwise(chunks[4:]))
    signature = send_after_decode(chunks)
    assert signature is not None
    assert signature.found, signature


@pytest.mark.parametrize("changes", [R1, R0A], ids=["R1", "R0a"])
def test_a_mesh_of_two_is_close(changes: dict[str, Any], references: Any, weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp_plan="pp1", plan__tp=2, **changes)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0, 2: 0}, outcome.stderr
    assert len(compare(outcome, references(changes), 1e-4)) == 8
    leader, follower = outcome.reports[1], outcome.reports[2]
    for key in ("call_id", "chunk_index", "input_digest_i64", "output_digest_i64", "observed_generator_calls"):
        assert [c[key] for c in leader["chunks"]] == [c[key] for c in follower["chunks"]]
    assert follower["imported"] == {"transformers": False, "diffusers": False}


def test_a_hard_cut_discards_what_is_in_flight(references: Any, weights_cache: Path, tmp_path: Path) -> None:
    """R1 keeps chunks in flight. The cut makes them stale: received, counted, never decoded; the rest is unharmed."""
    config = make_config(weights_cache, tmp_path, plan__tp_plan="pp0", pipeline__cut="discard", **R1)
    outcome = run_ranks(tmp_path / "run", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    account = outcome.reports[0]["account"]
    assert account["dropped"] >= 1
    assert len(outcome.events(0, "drop")) == account["dropped"]
    assert account["accepted"] == 8 == account["emitted"] + account["dropped"]
    assert account["abandoned"] == 0
    kept = compare(outcome, references(R1))
    emitted = [c["chunk_index"] for c in outcome.reports[0]["chunks"]]
    assert kept == [f"chunk_{index:05d}" for index in emitted]
    assert {5, 6, 7} <= set(emitted)
    assert len(outcome.reports[1]["chunks"]) == 8  # the mesh made them all, and gave one answer to each


def test_sigterm_drains_all_ranks(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tmp_path, plan__tp_plan="pp1", plan__tp=2, run__chunks=10_000)
    with start_ranks(tmp_path / "run", config.replace(run__record_latents=False)) as job:
        job.wait_for(lambda: job.reached(2, "leave B", 2), "chunk 2 on rank 2")
        for process in job.processes.values():
            process.send_signal(signal.SIGTERM)
        outcome = job.end(60)
    assert outcome.exit_codes == {0: 0, 1: 0, 2: 0}, outcome.stderr
    account = outcome.reports[0]["account"]
    assert account["accepted"] == account["emitted"] >= 2
    assert account["dropped"] == account["abandoned"] == 0


def rows(period: float) -> list[dict[str, float]]:
    """Two stages of 10 ms; 2 ms of each decode are phase A of the next chunk."""
    made = []
    for k in range(8):
        emit = (k + 1) * period
        times = {"tA0_ms": emit - 12, "tA1_ms": emit - 10, "tRecv_ms": emit - 10, "tEmit_ms": emit}
        made.append(
            times | {"chunk_index": k, "t_inside_ms": 2.0, "t_b_ms": 10.0, "t_mesh_idle_ms": 1.0, "t_anchor_ms": 4.0}
        )
    return made


def test_overlap_counts_hidden_time_once() -> None:
    """In step the period is 20 ms and nothing is hidden; overlapped it is 10 ms, all of it."""
    in_step, overlapped = overlap(rows(20.0)), overlap(rows(10.0))
    assert in_step is not None
    assert overlapped is not None
    assert (in_step.score, in_step.stage0_ms, in_step.period_ms) == (0.0, 10.0, 20.0)
    assert in_step.score_nested == pytest.approx(0.2)  # what a serial run would claim, phase A counted twice
    assert (overlapped.score, overlapped.hidden_ms, overlapped.chunks) == (1.0, 10.0, 5)
    assert (overlapped.anchor_ms, overlapped.bound_ms) == (4.0, 14.0)
    assert overlap(rows(10.0)[:3]) is None
    assert overlap([row for row in rows(10.0) if row["chunk_index"] % 2]) is None


def test_the_stages_of_one_chunk() -> None:
    row = rows(10.0)[3]
    assert stages(row, row["tEmit_ms"] - 13) == {"stage0_ms": 10.0, "stage1_ms": 10.0, "hidden_ms": 7.0}
    assert stages(row, row["tEmit_ms"] - 21)["hidden_ms"] == 0.0
    assert stages(row, None)["hidden_ms"] is None
