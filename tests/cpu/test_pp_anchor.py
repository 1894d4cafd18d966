"""Anchor-first against decode-all-first on real ranks of pp0: latents and pixels of a long stream, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.config import EngineConfig, from_dict
from tests.support.ranks import Outcome, run_ranks

CHUNKS = 14
CUTS = (5, 9)
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
[[event]]
at_chunk = 7
prompt = "a heron at the lake"
[[event]]
at_chunk = 9
cut = true
prompt = "a heron in flight"
[[event]]
at_chunk = 11
bias = 0.9
"""


def stream(cache: Path, path: Path, sizes: tuple[int, int, int], *, anchor_first: bool) -> Outcome:
    timeline = path / "timeline.toml"
    timeline.write_text(TIMELINE)
    frames, context, window = sizes
    config: EngineConfig = from_dict(
        {
            "model": {"cache_dir": str(cache)},
            "geometry": {
                "height": 32,
                "width": 32,
                "frames_per_chunk": frames,
                "context_frames": context,
                "window_frames": window,
            },
            "schedule": {"denoising_step_list": [1000, 500]},
            "plan": {"tp_plan": "pp0"},
            "pipeline": {"anchor_first": anchor_first, "cut": "finish"},
            "run": {"chunks": CHUNKS, "timeline": str(timeline), "record_latents": True},
            "sink": {"kinds": ["null"]},
        }
    )
    outcome = run_ranks(path / f"anchor-first-{anchor_first}", config)
    assert outcome.exit_codes == {0: 0, 1: 0}, outcome.stderr
    assert outcome.reports[0]["account"] == {"accepted": CHUNKS, "emitted": CHUNKS, "dropped": 0, "abandoned": 0}
    return outcome


def before_feed(outcome: Outcome) -> list[int]:
    """Latents that were decoded before the next envelope, chunk by chunk."""
    return [chunk["latents_before_feed"] for chunk in outcome.reports[0]["chunks"]]


@pytest.mark.parametrize(
    "sizes",
    [(3, 3, 6), (3, 2, 6), (2, 3, 6)],
    ids=lambda sizes: "F{}-K{}-W{}".format(*sizes),
)
def test_anchor_first_changes_no_bit(sizes: tuple[int, int, int], weights_cache: Path, tmp_path: Path) -> None:
    early, late = (stream(weights_cache, tmp_path, sizes, anchor_first=first) for first in (True, False))
    for kind in ("latents", "pixels"):
        ours, theirs = (load_file(outcome.run_dir / f"{kind}.safetensors") for outcome in (early, late))
        assert sorted(ours) == sorted(theirs) == [f"chunk_{index:05d}" for index in range(CHUNKS)]
        assert [key for key, value in ours.items() if not value.equal(theirs[key])] == []
        assert not ours["chunk_00002"].equal(ours["chunk_00004"])  # there is something to compare
    for key in ("call_id", "cache_epoch", "control_epoch", "do_kv_recompute", "output_digest_i64"):
        ours, theirs = ([chunk[key] for chunk in outcome.reports[0]["chunks"]] for outcome in (early, late))
        assert ours == theirs, key
    _reached_only_what_it_needs(before_feed(early), before_feed(late), sizes)


def _reached_only_what_it_needs(early: list[int], late: list[int], sizes: tuple[int, int, int]) -> None:
    """The streams were made in two ways. Before a cut, and at the end, nothing needs an anchor: both decode nothing."""
    frames, context, _ = sizes
    begins = [0, *CUTS]
    for index in range(CHUNKS - 1):
        start = frames * (index + 1 - max(begin for begin in begins if begin <= index))  # of the chunk that follows
        needs_no_pixel = index + 1 in CUTS or start - frames < context
        assert late[index] == (0 if index + 1 in CUTS else frames), index
        expected = 0 if needs_no_pixel else max(0, frames - context + 1)
        assert early[index] == expected < max(1, late[index]), index
