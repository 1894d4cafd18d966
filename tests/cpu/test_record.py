"""The clock of a chunk's stages."""

from __future__ import annotations

import pytest

from engine import record

S = 1_000_000_000


def test_a_pause_between_two_chunks_belongs_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0, 1 * S, 3 * S, 100 * S, 101 * S, 104 * S])
    monkeypatch.setattr(record.time, "monotonic_ns", lambda: next(moments))
    clock = record.Clock()
    clock.mark("t_a_ms")
    clock.mark("t_c_ms")
    assert clock.turn() == {"t_a_ms": 1e3, "t_c_ms": 2e3, "period_ms": 3e3, "ended_ns": 3 * S}
    clock.restart()
    clock.mark("t_a_ms")
    clock.mark("t_c_ms")
    assert clock.turn() == {"t_a_ms": 1e3, "t_c_ms": 3e3, "period_ms": 4e3, "ended_ns": 104 * S}
