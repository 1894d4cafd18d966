"""Phases A, B and C in one process: every schedule choice runs, and phase B refuses what breaks its contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.blackbox import BlackBox, read
from engine.comm.group import Group, Phase
from engine.config import EngineConfig, from_dict
from engine.errors import CallCountError, TripwireError
from engine.materials import PARTS, RANK0, Materials
from engine.model.loader import build_generator
from engine.plan import V0, V1, V11A, V11B
from engine.stage0 import Stage0
from engine.stage1 import Stage1
from engine.timeline import Event, Timeline
from engine.wire.envelope import Envelope

PROMPT = Timeline.of_prompt("a boat on a lake")


class Job:
    """All phases of one process."""

    def __init__(self, config: EngineConfig, directory: Path, timeline: Timeline = PROMPT) -> None:
        self.warnings: list[str] = []
        self.mesh = Group.solo()
        generator = build_generator(config, self.mesh, "sdpa", "cpu")
        self.box = directory / "box"
        box = BlackBox(self.box, 0)
        self.stage1 = Stage1(generator.dit, generator.kv, generator.cross, self.mesh, config, box)
        self.materials = Materials(config, RANK0, "cpu", self.warnings.append)
        self.stage0 = Stage0(config, timeline, self.materials)
        self.mesh.gate.phase = Phase.LINK

    def chunk(self) -> tuple[Envelope, torch.Tensor, torch.Tensor]:
        envelope = self.stage0.step()
        result = self.stage1.step(envelope, envelope.plan.chunk_index)
        assert result.observed_generator_calls == envelope.plan.expected_calls
        return envelope, result.latents_out_BFCHW, self.stage0.accept(result.latents_out_BFCHW, envelope.plan)


def make_config(cache: Path, **dotted: Any) -> EngineConfig:
    base = {"model": {"cache_dir": str(cache)}, "geometry": {"height": 32, "width": 32}}
    return from_dict(base).replace(**dotted)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        ({}, [4, 5, 5, 5]),
        ({"schedule__recompute": False}, [4, 4, 4, 4]),
        ({"schedule__clean_pass": True}, [5, 6, 6, 6]),
        ({"schedule__anchor": "latent"}, [4, 5, 5, 5]),
        ({"schedule__denoising_step_list": (1000,)}, [1, 2, 2, 2]),
        ({"schedule__kv_cache_attention_bias": 1.0}, [4, 5, 5, 5]),
        ({"geometry__context_frames": 1}, [4, 5, 5, 5]),
        ({"geometry__context_frames": 5, "geometry__window_frames": 8}, [4, 5, 5, 5]),
        ({"geometry__sink_frames": 1, "schedule__recompute": False}, [4, 4, 4, 4]),
        ({"geometry__frames_per_chunk": 2, "geometry__context_frames": 3}, [4, 5, 5, 5]),
        ({"model__dtype": "bfloat16"}, [4, 5, 5, 5]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_every_schedule_choice_runs(
    change: dict[str, Any], calls: list[int], weights_cache: Path, tmp_path: Path
) -> None:
    config = make_config(weights_cache, **change)
    job = Job(config, tmp_path)
    frames = config.geometry.frames_per_chunk
    for number, expected in enumerate(calls):
        envelope, latents_BFCHW, pixels_THWC = job.chunk()
        assert envelope.plan.expected_calls == expected
        assert latents_BFCHW.shape == (1, frames, 16, 4, 4)
        assert pixels_THWC.shape == (4 * frames - (3 if number == 0 else 0), 32, 32, 3)
        assert pixels_THWC.float().std() > 1.0


def test_the_anchor_regime_changes_the_result(weights_cache: Path, tmp_path: Path) -> None:
    """R0 is another video than R0a from the chunk on whose anchor is re-encoded, and the same before."""
    latents = {}
    for anchor in ("reencode", "latent"):
        (tmp_path / anchor).mkdir()
        job = Job(make_config(weights_cache, schedule__anchor=anchor), tmp_path / anchor)
        latents[anchor] = [job.chunk()[1] for _ in range(4)]
    same = [a.equal(b) for a, b in zip(latents["reencode"], latents["latent"], strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("tp_plan", [V0, V11A, V11B, V1])
def test_a_worker_completes_what_its_plan_leaves_to_it(tp_plan: str, weights_cache: Path, tmp_path: Path) -> None:
    """What rank 0 sends and a worker completes is, bit for bit, what rank 0 has."""
    config = make_config(weights_cache, plan__tp_plan=tp_plan)
    events = (Event(0, prompt="a boat"), Event(2, prompt="a storm"), Event(4, cut=True))
    job = Job(config, tmp_path, Timeline(events))
    parts = PARTS[tp_plan]
    worker = Materials(config, parts, "cpu", job.warnings.append) if parts.any else None
    for _ in range(6):
        envelope = job.stage0.step()
        sent = job.stage0.for_link(envelope)
        completed = sent if worker is None else worker.complete(sent)
        assert set(completed.tensors) == set(envelope.tensors)
        for key, tensor in envelope.tensors.items():
            ours = completed.tensors[key]
            assert (tensor is None and ours is None) or (ours is not None and ours.equal(tensor)), key
        latents_BFCHW = job.stage1.step(envelope, envelope.plan.chunk_index).latents_out_BFCHW
        job.stage0.accept(latents_BFCHW, envelope.plan)
        if worker is not None:
            worker.decode(latents_BFCHW)


def test_a_long_prompt_is_cut_with_one_warning(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path, Timeline.of_prompt("boat " * 500))
    job.chunk()
    job.chunk()
    assert len(job.warnings) == 1
    assert "longer than 32 tokens" in job.warnings[0]


@pytest.mark.parametrize("off", [1, -1])
def test_another_number_of_planned_calls_is_refused_before_phase_b(
    off: int, weights_cache: Path, tmp_path: Path
) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    envelope = job.stage0.step()
    plan = dataclasses.replace(envelope.plan, expected_calls=envelope.plan.expected_calls + off)
    with pytest.raises(CallCountError, match=f"is {4 + off}, but the plan computes 4"):
        job.stage1.step(dataclasses.replace(envelope, plan=plan), 0)
    assert job.stage1.kv.end_frame == 0


def test_a_position_out_of_order_is_refused_before_phase_b(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    job.chunk()
    envelope = job.stage0.step()
    plan = dataclasses.replace(envelope.plan, current_start_frame=4)
    with pytest.raises(TripwireError, match="current_start_frame is 4, expected 3"):
        job.stage1.step(dataclasses.replace(envelope, plan=plan), 1)


def test_missing_context_is_never_replaced(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    job.chunk()
    envelope = job.stage0.step()
    bare = dataclasses.replace(envelope, tensors=dict(envelope.tensors) | {"context_frames": None})
    with pytest.raises(TripwireError, match="needs 'context_frames'") as caught:
        job.stage1.step(bare, 1)
    assert caught.value.fm == "FM-06"


def test_nan_is_found_before_the_result_leaves(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    envelope = job.stage0.step()
    latents_BFCHW = envelope.tensors["latents"]
    assert latents_BFCHW is not None
    with torch.inference_mode():
        latents_BFCHW[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(TripwireError, match="latents_out of chunk 0: first in generator call 1 of 4, on rank 0"):
        job.stage1.step(envelope, 0)


def test_a_result_nobody_waits_for_is_refused(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    envelope, latents_BFCHW, _ = job.chunk()
    with pytest.raises(TripwireError, match="not in flight"):
        job.stage0.accept(latents_BFCHW, envelope.plan)


def test_phase_b_leaves_its_commitment_points(weights_cache: Path, tmp_path: Path) -> None:
    job = Job(make_config(weights_cache), tmp_path)
    job.chunk()
    assert [(r.action, r.chunk_index) for r in read(job.box)] == [("enter B", 0), ("leave B", 0)]


def test_an_altered_weight_is_named_at_the_next_hard_cut(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tripwires__fingerprint_every=1000)
    job = Job(config, tmp_path, Timeline((Event(0, prompt="a boat"), Event(2, cut=True))))
    job.chunk()
    with torch.no_grad():
        job.stage1.dit.get_parameter("blocks.1.ffn.0.weight")[0, 0] += 1e-4
    job.chunk()
    with pytest.raises(TripwireError, match=r"rank 0 in blocks\.1") as caught:
        job.chunk()
    assert caught.value.fm == "FM-31"


def test_with_the_fingerprint_off_the_altered_weight_goes_by(weights_cache: Path, tmp_path: Path) -> None:
    config = make_config(weights_cache, tripwires__fingerprint_every=0)
    job = Job(config, tmp_path, Timeline((Event(0, prompt="a boat"), Event(1, cut=True))))
    job.chunk()
    with torch.no_grad():
        job.stage1.dit.get_parameter("blocks.1.ffn.0.weight")[0, 0] += 1e-4
    job.chunk()
