"""Runs a runbook's blocks, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tpctl.books.execute import Commands, Ran
from tpctl.books.place import BookError
from tpctl.books.runbook import Block
from tpctl.verdict import Verdict

BLOCK_S = 120.0


@dataclass(frozen=True)
class Done:
    """One block, and what became of it."""

    runbook: str
    block: Block
    verdict: Verdict
    message: str
    ran: Ran | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "runbook": self.runbook,
            "block": self.block.name,
            "section": self.block.section,
            "command": self.ran.command if self.ran else self.block.command,
            "changes": self.block.changes,
            "verdict": self.verdict.value,
            "message": self.message,
            "exit_code": self.ran.code if self.ran else None,
            "wall_s": self.ran.wall_s if self.ran else None,
        }


def judge(runbook: str, block: Block, ran: Ran, *, as_json: bool) -> Done:
    """Pure. What a block shows is looked at only where its output is JSON."""
    if ran.late:
        return Done(runbook, block, Verdict.UNKNOWN, f"no answer after {ran.wall_s:.1f} s: ended", ran)
    expect = block.expect if as_json else replace(block.expect, path=None)
    good, message, _ = expect.judge(ran.code, ran.document if as_json else None)
    if not good and (said := ran.stderr.strip().splitlines()):
        message += f": {said[-1]}"
    return Done(runbook, block, Verdict.PASS if good else Verdict.FAIL, message, ran)


def perform(
    runbook: str,
    blocks: Iterable[Block],
    commands: Commands,
    *,
    allowed: Callable[[Block, str], bool],
    before: Callable[[Block, str], None],
    after: Callable[[Done], None],
) -> list[Done]:
    """Run blocks in their order; stop at none: a runbook's reader decides what an answer means.

    `allowed` is asked before a block that changes something.
    """
    results = []
    for block in blocks:
        try:
            line = commands.fill(block.command, BLOCK_S)
        except BookError as error:
            results.append(Done(runbook, block, Verdict.UNCHECKED, f"{error.message}; {error.next_step}"))
            after(results[-1])
            continue
        before(block, line)
        if block.changes and not allowed(block, line):
            results.append(Done(runbook, block, Verdict.SKIP, "it changes something, and nobody said yes"))
        else:
            results.append(judge(runbook, block, commands.run(line, BLOCK_S), as_json=False))
        after(results[-1])
    return results
