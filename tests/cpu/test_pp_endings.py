"""Real ranks of pp0 and pp1 that are late, differ, break or go: who says so, in which words, by which exit code."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from engine.blackbox import Contents, read_box
from engine.config import EngineConfig, from_dict
from engine.lifecycle import RankState
from tests.support.ranks import Job, Outcome, run_ranks, start_ranks

PLANTS = "tests.cpu.pp_plants:"
FOR_EVER = 10_000
R1: dict[str, Any] = {"schedule__recompute": False}


def make_config(cache: Path, plan: str = "pp0", **dotted: Any) -> EngineConfig:
    base = from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {"height": 32, "width": 32},
            "schedule": {"denoising_step_list": [1000, 500]},
            "plan": {"tp_plan": plan},
            "run": {"chunks": 6},
            "sink": {"kinds": ["null"]},
        }
    )
    return base.replace(**dotted)


def box(outcome: Outcome | Job, rank: int) -> Contents:
    return read_box(outcome.run_dir / "ranks" / f"rank{rank}.blackbox")


def joining(job: Job, rank: int) -> bool:
    path = job.run_dir / "ranks" / f"rank{rank}.blackbox"
    return path.exists() and box(job, rank).live.state is RankState.JOINING


def error(outcome: Outcome, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = outcome.reports[rank]["error"]
    return found


def acts(outcome: Outcome, rank: int, chunk_index: int) -> list[str]:
    """What this rank's black box shows of a chunk, in order."""
    return [entry.action for entry in box(outcome, rank).commitments if entry.chunk_index == chunk_index]


def balanced(outcome: Outcome) -> dict[str, int]:
    account: dict[str, int] = outcome.reports[0]["account"]
    assert account["accepted"] == account["emitted"] + account["dropped"] + account["abandoned"]
    return account


# Late, or never -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1], ids=["Stage 0", "leader"])
def test_a_side_that_comes_late_is_waited_for(late: int, weights_cache: Path, tmp_path: Path) -> None:
    with start_ranks(tmp_path / "run", make_config(weights_cache, run__chunks=2), ranks=[1 - late]) as job:
        job.wait_for(lambda: joining(job, 1 - late), "the first side waits")
        job.add(late)
        outcome = job.end()
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert balanced(outcome)["emitted"] == 2


@pytest.mark.parametrize(
    ("missing", "code", "says"),
    [
        (0, "TP-3202", "which rank 0 (stage0) serves, and which did not come within 1 s"),
        (1, "TP-3201", "rank 1 (stage1+leader) did not reach 'join' within 1 s (waited for by rank 0; 1 of 2 came)"),
    ],
    ids=["Stage 0", "leader"],
)
def test_a_side_that_never_comes_is_named(
    missing: int, code: str, says: str, weights_cache: Path, tmp_path: Path
) -> None:
    there = 1 - missing
    config = make_config(weights_cache, comm__join_timeout_s=1.0)
    outcome = run_ranks(tmp_path / "run", config, ranks=[there])
    assert outcome.exit_codes == {there: 75}
    assert says in outcome.stderr[there]
    assert (error(outcome, there)["code"], error(outcome, there)["evidence"]["missing"]) == (code, [missing])


# Other sizes on the two sides ---------------------------------------------------------------------------------------


def test_another_geometry_on_the_two_sides_is_a_table_by_rank(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache)
    outcome = run_ranks(tmp_path / "run", config, configs={1: config.replace(geometry__height=48)})
    assert outcome.exit_codes == {0: 75, 1: 75}, outcome.stderr
    for rank in (0, 1):
        assert error(outcome, rank)["evidence"]["differences"] == {"config.geometry.height": {"0": "32", "1": "48"}}
        assert outcome.reports[rank]["chunks"] == []


def test_the_shape_handshake_itself_includes_stage0(weights_cache: Path, tmp_path: Path) -> None:
    """The guard before it is blind on both sides, so that both load, and only the shapes they have are left."""
    config = make_config(weights_cache)
    blind = dict.fromkeys((0, 1), f"{PLANTS}blind_to_geometry")
    outcome = run_ranks(tmp_path / "run", config, configs={1: config.replace(geometry__height=48)}, plants=blind)
    assert outcome.exit_codes == {0: 75, 1: 75}, outcome.stderr
    expected = {
        "geometry.latent_hw": {"0": "(4, 4)", "1": "(6, 4)"},
        "geometry.tokens_per_frame": {"0": "4", "1": "6"},
    }
    for rank in (0, 1):
        assert error(outcome, rank)["evidence"]["differences"] == expected
        assert "ranks differ in shapes or effective backends" in outcome.stderr[rank]
        assert outcome.reports[rank]["chunks"] == []


def test_a_queue_of_no_depth_ends_a_rank_before_it_joins(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache)
    with start_ranks(
        tmp_path / "run", config, ranks=[], arguments={0: ["--config", str(tmp_path / "bad.toml")]}
    ) as job:
        (tmp_path / "bad.toml").write_text('[plan]\ntp_plan = "pp0"\n[pipeline]\nd_out = 0\n')
        job.add(0)
        outcome = job.end()
    assert outcome.exit_codes == {0: 77}
    assert "TP-1014: pipeline.d_out must be at least 1, is 0" in outcome.stderr[0]


# What has no contract, and what breaks one --------------------------------------------------------------------------


def test_what_pp_has_no_contract_for_never_leaves_stage0(weights_cache: Path, tmp_path: Path) -> None:
    """VACE's frames. Video-to-video has version 2 of the envelope: tests/cpu/test_pp_wire.py."""
    name = "vace_frames"
    outcome = run_ranks(tmp_path / "run", make_config(weights_cache), plants={0: f"{PLANTS}add_vace_frames"})
    assert outcome.exit_codes == {0: 70, 1: 0}, outcome.stderr  # the mesh is well, and drains
    assert error(outcome, 0)["type"] == "PreflightError"
    assert error(outcome, 0)["evidence"]["field"] == name
    assert name in outcome.stderr[0]
    assert acts(outcome, 1, 2) == []  # not one byte of it came
    assert balanced(outcome) == {"accepted": 3, "emitted": 2, "dropped": 0, "abandoned": 1}


def test_what_the_leader_rejects_is_answered_on_both_sides(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, "pp1", plan__tp=2)
    outcome = run_ranks(tmp_path / "run", config, plants={0: f"{PLANTS}send_vace"})
    assert outcome.exit_codes == {0: 73, 1: 70, 2: 73}, outcome.stderr
    assert error(outcome, 1)["evidence"]["field"] == "pp_disable_vace"
    for rank, words in ((0, "the mesh leader failed with"), (2, "pp_disable_vace")):
        assert error(outcome, rank)["type"] == "PeerError"
        assert words in error(outcome, rank)["message"]
        assert "pp_disable_vace" in error(outcome, rank)["message"]
    assert error(outcome, 0)["evidence"]["peer_code"] == error(outcome, 1)["code"]
    # The leader had the envelope, told the mesh, then answered; nobody entered phase B for it.
    assert acts(outcome, 1, 2) == ["recv INFER", "send RESULT"]
    said = [entry.action for entry in box(outcome, 1).commitments]
    assert said[-2:] == ["send ERROR", "send RESULT"]
    assert [entry.action for entry in box(outcome, 2).commitments][-1] == "recv ERROR"
    assert acts(outcome, 2, 2) == []
    assert balanced(outcome)["emitted"] == 2


def test_a_result_of_another_shape_ends_both_sides(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, "pp1", plan__tp=2)
    outcome = run_ranks(tmp_path / "run", config, plants={1: f"{PLANTS}answer_smaller"})
    assert outcome.exit_codes == {0: 70, 1: 74, 2: 73}, outcome.stderr
    refusal = error(outcome, 0)
    assert (refusal["type"], refusal["evidence"]["field"], refusal["ids"]["chunk_index"]) == (
        "FrameError",
        "latents_out",
        2,
    )
    assert error(outcome, 1)["fm"] == "FM-40"
    assert balanced(outcome)["emitted"] == 2
    assert "take RESULT" not in acts(outcome, 0, 2)  # it never reached Stage 0's loop


# Gone, or stuck -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "exit_codes"), [(0, {0: -9, 1: 74, 2: 73}), (1, {0: 74, 1: -9, 2: 74})], ids=["Stage 0", "leader"]
)
def test_a_side_that_goes_mid_stream_ends_the_others(
    victim: int, exit_codes: dict[int, int], weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, "pp1", plan__tp=2, run__chunks=FOR_EVER)
    with start_ranks(tmp_path / "run", config) as job:
        job.wait_for(lambda: job.reached(2, "leave B", 2), "chunk 2 on rank 2")
        job.processes[victim].send_signal(signal.SIGKILL)
        outcome = job.end(60)
    assert outcome.exit_codes == exit_codes, outcome.stderr
    witness = 1 - victim
    assert error(outcome, witness)["fm"] == "FM-40"
    assert "pp_pg" in error(outcome, witness)["message"]
    if victim:
        balanced(outcome)


def test_a_comms_thread_that_does_not_end_poisons_its_rank(weights_cache: Path, tmp_path: Path) -> None:
    """Stage 0 fails while the mesh holds an envelope, and the mesh never answers it."""
    config = make_config(weights_cache, pipeline__join_timeout_s=1.0, **R1)
    plants = {0: f"{PLANTS}fail_to_record", 1: f"{PLANTS}never_answer"}
    with start_ranks(tmp_path / "run", config, plants=plants) as job:
        assert job.processes[0].wait(60) == 76, job.stderr()
        outcome = job.end(0.1)
    poisoned = error(outcome, 0)
    assert (poisoned["code"], poisoned["fm"]) == ("TP-6404", "FM-21")
    assert "no process group is touched again" in outcome.stderr[0]
    assert poisoned["evidence"]["unanswered"]
    assert balanced(outcome)["abandoned"] >= 1
    last = box(outcome, 0)
    assert last.commitments[-1].action == "leave now"
    assert max(entry.t_ns for entry in last.collectives) < last.commitments[-1].t_ns
