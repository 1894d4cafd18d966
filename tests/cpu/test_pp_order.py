"""The rules of contract section 11 on real ranks, from the order of commitments in Stage 0's black box. No clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.blackbox import Commitment, read
from engine.config import from_dict
from tests.support.ranks import Outcome, run_ranks

CHUNKS = 10
R1: dict[str, Any] = {"schedule__recompute": False}
DECODE_FIRST: dict[str, Any] = {"pipeline__anchor_first": False}
SHALLOW = R1 | {"pipeline__d_in": 1, "pipeline__d_out": 1}
DEEP = R1 | {"pipeline__d_in": 3, "pipeline__d_out": 4}


@pytest.fixture(scope="module")
def stream(weights_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Outcome]:
    """A job with these changes, run once for all tests that ask for it."""
    made: dict[str, Outcome] = {}
    base = from_dict(
        {
            "model": {"cache_dir": str(weights_cache)},
            "geometry": {"height": 32, "width": 32},
            "schedule": {"denoising_step_list": [1000]},
            "plan": {"tp_plan": "pp0"},
            "run": {"chunks": CHUNKS},
            "sink": {"kinds": ["null"]},
        }
    )

    def run(changes: dict[str, Any]) -> Outcome:
        key = repr(changes)
        if key not in made:
            made[key] = run_ranks(tmp_path_factory.mktemp("order") / "run", base.replace(**changes))
            assert made[key].exit_codes == {0: 0, 1: 0}, made[key].stderr
        return made[key]

    return run


class Order:
    """Stage 0's commitments: `at[action, chunk_index]` is the place of one in their order."""

    def __init__(self, outcome: Outcome) -> None:
        self.entries: list[Commitment] = read(outcome.run_dir / "ranks" / "rank0.blackbox")
        assert [entry.seq for entry in self.entries] == list(range(1, len(self.entries) + 1))  # none is lost
        self.at: dict[tuple[str, int], int] = {}
        for place, entry in enumerate(self.entries):
            if entry.chunk_index >= 0:
                assert (entry.action, entry.chunk_index) not in self.at, entry
                self.at[entry.action, entry.chunk_index] = place

    def standing(self, begun: str, ended: str) -> Iterator[tuple[str, int]]:
        """After each commitment: its action, and how many chunks are between these two of theirs."""
        count = 0
        for entry in self.entries:
            count += (entry.action == begun) - (entry.action == ended)
            yield entry.action, count


@pytest.mark.parametrize(
    "changes", [R1, {}, DECODE_FIRST, SHALLOW, DEEP], ids=["R1", "R0a", "R0a-decode-first", "shallow", "deep"]
)
def test_stage0_and_its_comms_thread_stay_in_step(
    changes: dict[str, Any], stream: Callable[[dict[str, Any]], Outcome]
) -> None:
    outcome = stream(changes)
    order = Order(outcome)
    queues = outcome.reports[0]["generator"]
    d_in, d_out = queues["d_in"], queues["d_out"]

    # No queue was ever longer than it may be; the comms thread holds one envelope more, which it is sending.
    assert 1 <= queues["d_in_most"] <= d_in
    assert 1 <= queues["d_out_most"] <= d_out
    assert max(count for _, count in order.standing("queue INFER", "send INFER")) <= d_in + 1
    assert max(count for _, count in order.standing("recv RESULT", "take RESULT")) <= d_out

    # No envelope is sent while ready_for_decode is full: there is a place for the answer of each.
    sent = [count for action, count in order.standing("send INFER", "take RESULT") if action == "send INFER"]
    assert len(sent) == CHUNKS
    assert max(sent) <= d_out
    if changes == R1:
        assert max(sent) > 1  # the mesh had work in advance

    # Each chunk goes its way, and chunks come out in order.
    for chunk in range(CHUNKS):
        way = ["queue INFER", "send INFER", "recv RESULT", "take RESULT", "emit"]
        assert [order.at[action, chunk] for action in way] == sorted(order.at[action, chunk] for action in way)
    emitted = [order.at["emit", chunk] for chunk in range(CHUNKS)]
    assert emitted == sorted(emitted)


def decoded(order: Order, chunk: int) -> int:
    """Where the decode of the last of this chunk's latents began."""
    return order.at["decode", chunk] if ("decode", chunk) in order.at else order.at["decode first", chunk]


def sent_after_decode(outcome: Outcome) -> list[int]:
    """Chunks whose last latents were decoded before the next envelope was out."""
    order = Order(outcome)
    return [k for k, following in pairwise(range(CHUNKS)) if decoded(order, k) < order.at["send INFER", following]]


def test_the_next_envelope_is_out_before_a_result_is_decoded(stream: Callable[[dict[str, Any]], Outcome]) -> None:
    """For R1 and R0a anchor-first; decode-all-first is what breaks it, and is seen to."""
    assert sent_after_decode(stream(R1)) == []
    anchored = stream({})
    assert sent_after_decode(anchored) == []
    order = Order(anchored)
    for chunk in range(1, CHUNKS - 1):  # the first part of a decode, for the anchor, and the rest after the envelope
        assert order.at["decode first", chunk] < order.at["queue INFER", chunk + 1] < order.at["decode", chunk]
    late = stream(DECODE_FIRST)
    assert sent_after_decode(late) == list(range(CHUNKS - 1))
