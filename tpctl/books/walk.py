"""Walks a checklist: runs each item's command, and judges its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tpctl.books import record
from tpctl.books.checklist import Checklist, Item
from tpctl.books.execute import Commands, Ran
from tpctl.books.place import BookError
from tpctl.errors import describe
from tpctl.verdict import Coverage, Finding, Verdict, worst

# Asks a person whether the item is done; the answer is theirs.
Confirm = Callable[[Item, "Answer"], bool]


@dataclass(frozen=True)
class Answer:
    """What one item's command answered. `found` is the value at the item's path."""

    item: Item
    verdict: Verdict
    message: str
    ran: Ran | None = None
    found: Any = None
    confirmed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON and, less what is None, for the record."""
        ran = self.ran
        return {
            "id": self.item.id,
            "text": self.item.text,
            "command": ran.command if ran else self.item.command,
            "wanted": self.item.expect.words,
            "verdict": self.verdict.value,
            "message": self.message,
            "exit_code": ran.code if ran else None,
            "found": self.found if isinstance(self.found, str | int | float | bool) else None,
            "wall_s": ran.wall_s if ran else None,
            "answered_by": ran.answered_by if ran else None,
            "stdout_sha256": record.digest(ran.stdout.encode()) if ran else None,
            "confirmed": self.confirmed,
            "drill": self.item.drill,
            "runbook": self.item.on_fail,
        }


@dataclass(frozen=True)
class Walked:
    """A checklist that was run."""

    checklist: Checklist
    answers: tuple[Answer, ...]
    started_at: str
    ended_at: str

    @property
    def verdict(self) -> Verdict:
        return worst(answer.verdict for answer in self.answers)

    @property
    def coverage(self) -> Coverage:
        return Coverage.of(answer.verdict for answer in self.answers)

    @property
    def late(self) -> bool:
        return any(answer.ran is not None and answer.ran.late for answer in self.answers)

    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(
                f"checklist.{answer.item.id}",
                answer.verdict,
                answer.message,
                value=answer.to_dict()["found"],
                limit=answer.item.expect.words,
                where=self.checklist.id,
                next=f"tpctl runbook show {answer.item.on_fail}",
            )
            for answer in self.answers
            if answer.verdict is not Verdict.PASS
        )

    def sealed(self) -> dict[str, Any]:
        """The record of this run."""
        coverage = self.coverage
        head = {
            "checklist": self.checklist.id,
            "title": self.checklist.title,
            "mode": self.checklist.mode.value,
            "checklist_sha256": record.digest(self.checklist.text),
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "verdict": self.verdict.value,
            "coverage": {"checked": coverage.checked, "expected": coverage.expected},
            "who": record.who(),
            "where": record.where(),
        }
        items = [
            {key: value for key, value in answer.to_dict().items() if value is not None} for answer in self.answers
        ]
        return record.seal(head, items)


def judge(item: Item, ran: Ran) -> Answer:
    """Pure. A command that was cut off answered nothing; what it printed until then proves nothing."""
    if ran.late:
        return Answer(item, Verdict.UNKNOWN, f"no answer after {ran.wall_s:.1f} s: ended", ran)
    good, message, found = item.expect.judge(ran.code, ran.document)
    if not good and ran.code not in item.expect.exit and (said := ran.stderr.strip().splitlines()):
        message += f": {said[0] if said[0].startswith('error') else said[-1]}"
    return Answer(item, Verdict.PASS if good else Verdict.FAIL, message, ran, found)


def walk(
    checklist: Checklist,
    commands: Commands,
    *,
    confirm: Confirm | None = None,
    before: Callable[[Item], None] | None = None,
    after: Callable[[Answer], None] | None = None,
) -> Walked:
    """Every item in its order, within the checklist's budget; what does not get its turn is UNCHECKED."""
    started, end = now(), time.monotonic() + checklist.budget_s
    answers = []
    for item in checklist.items:
        if before is not None:
            before(item)
        left = end - time.monotonic()
        if left <= 0:
            words = f"not run: the budget of {checklist.budget_s:g} s was spent"
            answer = Answer(item, Verdict.UNCHECKED, words)
        else:
            answer = _answer(item, commands, left)
        if confirm is not None:
            done = confirm(item, answer)
            refused = answer.verdict is Verdict.PASS and not done
            answer = Answer(
                item,
                Verdict.FAIL if refused else answer.verdict,
                "not confirmed" if refused else answer.message,
                answer.ran,
                answer.found,
                done,
            )
        answers.append(answer)
        if after is not None:
            after(answer)
    return Walked(checklist, tuple(answers), started, now())


def _answer(item: Item, commands: Commands, left_s: float) -> Answer:
    try:
        return judge(item, commands.run(item.command, left_s))
    except BookError as error:
        return Answer(item, Verdict.UNKNOWN, describe(error.to_record())[0])


def prepare(checklists: Sequence[Checklist], commands: Commands, run_dir: Path) -> None:
    """Run once, before all of them and outside of their budgets, the drills that they name."""
    budget_s = sum(one.budget_s for one in checklists)
    commands.batch([item.command for one in checklists for item in one.items], budget_s, run_dir)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def keep(walked: Walked, directory: Path) -> tuple[Path, dict[str, Any]]:
    """Write the record, and beside it what each command printed."""
    sealed = walked.sealed()
    path = directory / f"{walked.checklist.id}.toml"
    outputs = directory / walked.checklist.id
    outputs.mkdir(parents=True)
    for answer in walked.answers:
        if answer.ran is not None:
            (outputs / f"{answer.item.id}.stdout").write_text(answer.ran.stdout, encoding="utf-8")
            (outputs / f"{answer.item.id}.stderr").write_text(answer.ran.stderr, encoding="utf-8")
    record.write(sealed, path)
    return path, sealed
