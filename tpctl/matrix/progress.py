"""Who watches a matrix run: a live display on a terminal, plain lines anywhere else. All of it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tpctl.matrix.case import Case
from tpctl.matrix.report import note
from tpctl.matrix.runner import CaseResult
from tpctl.output import STYLE, Output


class Watcher:
    """Plain lines: one when a case starts, one when it is judged. Also a context manager, so that both kinds are."""

    def __init__(self, out: Output, total: int) -> None:
        self._out = out
        self._total = total
        self._number = 0

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, case: Case) -> None:
        self._number += 1
        self._out.say(f"[{self._number}/{self._total}] {case.id}: {case.title}")

    def tick(self, case: Case, elapsed_s: float) -> None:
        return None

    def done(self, result: CaseResult) -> None:
        self._out.say(f"[{self._number}/{self._total}] {_line(result)}")
        self._out.stream("case", result.to_dict())


class LiveWatcher(Watcher):
    """A bar over all cases, the running one and its seconds; judged cases scroll by above it."""

    def __init__(self, out: Output, total: int) -> None:
        super().__init__(out, total)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bar: Any = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Watcher:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, case: Case) -> None:
        self._bar.update(self._task, description=case.id)

    def tick(self, case: Case, elapsed_s: float) -> None:
        self._bar.update(self._task, description=f"{case.id} {elapsed_s:.0f} of {case.deadline_s:.0f} s")

    def done(self, result: CaseResult) -> None:
        from rich.text import Text

        self._bar.advance(self._task)
        self._bar.console.print(Text(_line(result), style=STYLE[result.verdict.value]))
        self._out.stream("case", result.to_dict())


def watcher(out: Output, total: int) -> Watcher:
    make: Callable[[Output, int], Watcher] = LiveWatcher if not out.quiet and out.pretty(sys.stderr) else Watcher
    return make(out, total)


def _line(result: CaseResult) -> str:
    wall = result.metrics.get("wall_s")
    words = [result.verdict.value, result.case.id, f"{wall:.1f} s" if wall else "", note(result)]
    return "  ".join(word for word in words if word)
