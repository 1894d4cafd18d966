"""How everything here is measured: in pairs, close together in time, and as ratios.

A machine that other programs share drifts by tens of percent within seconds. So rivals take turns: each pair runs both,
every second pair in the other order, and what counts is the median over the ratios of pairs. Drift hits both sides of
a pair alike and cancels; the spread (lowest and highest ratio) is reported with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `ratio` is what the target is about, as `meaning` says. `target` bounds it: from above if `at_most`, else from
    below; None is information only. `low` and `high` are the extreme ratios of single pairs.
    """

    name: str
    ours: float
    rival_name: str
    rival: float
    unit: str
    ratio: float
    meaning: str = "ours / rival"
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_most: bool = True
    samples: int = 1
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


@dataclass(frozen=True)
class Pairs:
    """Times of rivals measured in turns: `times[name][i]` belongs to turn i. Seconds."""

    times: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratios(self, over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(self.times[over], self.times[under], strict=True)]

    def row(
        self,
        name: str,
        ours: str,
        rival: str,
        *,
        rival_name: str,
        unit: str = "ms",
        inverse: bool = False,
        target: float | None = None,
        note: str = "",
    ) -> Row:
        """Ours over the rival; with `inverse` the rival over ours (a speed-up, whose target is a lower bound)."""
        ratios = self.ratios(rival, ours) if inverse else self.ratios(ours, rival)
        scale = {"ms": 1e3, "s": 1.0}[unit]
        return Row(
            name=name,
            ours=self.median(ours) * scale,
            rival_name=rival_name,
            rival=self.median(rival) * scale,
            unit=unit,
            ratio=statistics.median(ratios),
            meaning="rival / ours" if inverse else "ours / rival",
            low=min(ratios),
            high=max(ratios),
            target=target,
            at_most=not inverse,
            samples=len(ratios),
            note=note,
        )


def in_turns(
    rivals: dict[str, Callable[[], float | None]],
    turns: int,
    *,
    warm_up: int = 1,
) -> Pairs:
    """Run all rivals `turns` times, reversing the order every second turn.

    Args:
        rivals: name to a call; what it returns is its time in seconds, and None means the call itself is the time.
        turns: measured turns, after `warm_up` that are thrown away.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warm_up + turns):
        names = order(list(rivals), turn)
        for name in names:
            started = time.perf_counter()
            own = rivals[name]()
            took = time.perf_counter() - started if own is None else own
            if turn >= warm_up:
                times[name].append(took)
    return Pairs(times)


def order(names: Sequence[str], turn: int) -> list[str]:
    """The order of one turn. Ranks that measure together must use the same."""
    return list(names) if turn % 2 == 0 else list(reversed(names))
