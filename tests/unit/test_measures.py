"""Who is slow, told from how long each rank waited for the others."""

from __future__ import annotations

from typing import Any

import pytest

from engine.measures import straggler


def chunks(*waits_ms: float | None, t_b_ms: float = 100.0) -> list[dict[str, Any]]:
    return [{"call_id": call, "t_b_ms": t_b_ms, "t_wait_ms": wait} for call, wait in enumerate(waits_ms)]


def test_the_rank_that_waits_for_nobody_is_the_slow_one() -> None:
    rows = {0: chunks(*[60.0] * 8), 1: chunks(*[55.0] * 8), 2: chunks(*[5.0] * 8)}
    found = straggler(rows)
    assert found is not None
    assert (found.rank, found.waits_ms, found.share, found.chunks) == (2, 50.0, 0.5, 6)
    assert "rank 2 is slow: every other rank waits 50 ms a chunk for it, 50% of phase B" in found.sentence()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ({0: chunks(*[10.0] * 8), 1: chunks(*[5.0] * 8)}, "a little"),
        ({0: chunks(*[60.0] * 8), 1: chunks(*[5.0] * 8), 2: chunks(*[6.0] * 8)}, "two ranks are slow alike"),
        ({0: chunks(*[60.0, 5.0] * 4), 1: chunks(*[5.0, 60.0] * 4)}, "now this one, now that one"),
        ({0: chunks(*[60.0] * 5), 1: chunks(*[5.0] * 5)}, "too few chunks after the warm-up"),
        ({0: chunks(*[60.0] * 8), 1: chunks(*[None] * 8)}, "a device does not tell"),
        ({0: chunks(*[60.0] * 8)}, "one rank"),
        ({}, "no rank"),
        ({0: [{"call_id": call} for call in range(8)], 1: chunks(*[5.0] * 8)}, "records of an older version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nobody_is_named_where_nobody_stands_out(rows: dict[int, list[dict[str, Any]]], why: str) -> None:
    assert straggler(rows) is None, why


def test_a_rank_that_died_early_is_compared_as_far_as_it_came() -> None:
    rows = {0: chunks(*[60.0] * 20), 1: chunks(*[5.0] * 8)}
    found = straggler(rows)
    assert found is not None
    assert (found.rank, found.chunks) == (1, 6)
