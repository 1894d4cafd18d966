"""Plans pp0 and pp1 on CUDA devices: Stage 0, the link over pinned memory, a mesh over NCCL; against the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from engine.config import from_dict
from tests.support.ranks import Outcome, run_ranks

DEVICES = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu]
needs_one = pytest.mark.skipif(DEVICES < 1, reason="needs a CUDA device")
needs_two = pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices")


def stream(cache: Path, path: Path, device: str, plan: dict[str, Any], places: list[int]) -> Outcome:
    """Five chunks in R0a with a prompt change and a hard cut; `places` are the devices of the ranks."""
    timeline = path.parent / "timeline.toml"
    timeline.write_text(
        '[[event]]\nat_chunk = 0\nprompt = "a fox"\n[[event]]\nat_chunk = 2\nprompt = "a heron"\n'
        "[[event]]\nat_chunk = 4\ncut = true\n"
    )
    config = from_dict(
        {
            "model": {"cache_dir": str(cache), "device": device, "attention_backend": "sdpa"},
            "plan": plan,
            "pipeline": {"cut": "finish"},
            "run": {"chunks": 5, "timeline": str(timeline), "record_latents": True},
            "sink": {"kinds": ["null"]},
        }
    )
    environ = {rank: {"LOCAL_RANK": str(place)} for rank, place in enumerate(places)}
    outcome = run_ranks(path, config, environ=environ)
    assert set(outcome.exit_codes.values()) == {0}, outcome.stderr
    return outcome


def equal_to_the_cpu(cache: Path, path: Path, plan: dict[str, Any], places: list[int]) -> Outcome:
    ours = stream(cache, path / "cuda", "cuda", plan, places)
    theirs = stream(cache, path / "cpu", "cpu", plan, places)
    mine, other = (load_file(outcome.run_dir / "latents.safetensors") for outcome in (ours, theirs))
    assert sorted(mine) == sorted(other)
    for key, latents in other.items():
        assert abs(mine[key] - latents).max() <= 1e-3 * abs(latents).max(), key
    assert ours.reports[0]["effective"]["device"] == "cuda"
    return ours


@needs_one
def test_pp0_on_one_device(weights_cache: Path, tmp_path: Path) -> None:
    """Both ranks share the device: what counts is that no byte is read before it is there."""
    equal_to_the_cpu(weights_cache, tmp_path, {"tp_plan": "pp0"}, [0, 0])


@needs_two
def test_pp0_on_two_devices(weights_cache: Path, tmp_path: Path) -> None:
    equal_to_the_cpu(weights_cache, tmp_path, {"tp_plan": "pp0"}, [0, 1])


@needs_two
def test_pp1_with_a_mesh_over_nccl(weights_cache: Path, tmp_path: Path) -> None:
    """Stage 0 shares the leader's device; it is in no NCCL group with it."""
    outcome = equal_to_the_cpu(weights_cache, tmp_path, {"tp_plan": "pp1", "tp": 2}, [0, 0, 1])
    assert outcome.reports[1]["effective"]["comm_backend"] == "cpu:gloo,cuda:nccl"
    digests = [[chunk["output_digest_i64"] for chunk in outcome.reports[rank]["chunks"]] for rank in (1, 2)]
    assert digests[0] == digests[1]
