"""Rehearses runbooks: every block is run, safely, and against the failure that the page is about.

The failure is caused for real by the page's drill, and {run} is what that drill's job left; where no drill can cause
it, {run} is the run directory of a healthy job. {job} is that job: a small one, in a state directory of its own. What
would end it is run with --dry-run; other changes are made to it. It is drained at last, which must lose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tpctl.books.checklist import load_all as all_checklists
from tpctl.books.execute import Commands
from tpctl.books.expect import Expect
from tpctl.books.perform import BLOCK_S, Done, judge
from tpctl.books.place import RUNBOOKS, BookError
from tpctl.books.runbook import Block, Runbook, all_ids, dead_links
from tpctl.drill import table
from tpctl.failuremodes import FAILURE_MODES, runbook_id
from tpctl.verdict import Verdict

JOB = "rehearsal"
SMALL = ("sink.kinds=null", "geometry.height=32", "geometry.width=32", "schedule.denoising_step_list=1000", "plan.tp=2")
WITH_DRY_RUN = ("drain", "abort", "up")
OUTPUT = re.compile(r" -o (table|wide|json|yaml)\b")
DRILLS_S, START_S = 300.0, 120.0
HOUSE = "rehearsal"  # what stands in place of a runbook's id for the rehearsal's own steps


@dataclass
class Rehearsal:
    """`root` gets everything that is made."""

    root: Path
    after: Callable[[Done], None]
    answers: dict[str, Any] = field(default_factory=dict)

    def run(self, books: Sequence[Runbook]) -> list[Done]:
        """Every check and block of these pages. The job is gone when this returns, whatever happened."""
        results = [done for one in books for done in static(one)]
        for done in results:
            self.after(done)
        house = Commands(environment={"TPCTL_STATE_DIR": str(self.root / "state")}, done=self.answers)
        sets = " ".join(f"--set {pair}" for pair in SMALL)
        try:
            results += [self._step(house, "start", f"tpctl up --name {JOB} {sets}", START_S)]
            runs, caused = self._cause(house, books)
            results += caused
            results += [self._step(house, "running", f"tpctl wait {JOB} --for running --timeout 120", START_S)]
            healthy = self.root / "state" / "jobs" / JOB / "attempts" / "1"
            for one in books:
                given = {"job": JOB, "run": str(runs.get(one.drill, healthy))}
                commands = Commands(given, house.environment)
                for block in one.blocks:
                    results.append(rehearse(one, block, commands))
                    self.after(results[-1])
        finally:
            results += [self._step(house, "drain", f"tpctl drain {JOB}", START_S)]
        return results

    def _step(self, commands: Commands, name: str, line: str, timeout_s: float) -> Done:
        block = Block(name, HOUSE, line, changes=True, expect=Expect())
        done = judge(HOUSE, block, commands.run(line, timeout_s), as_json=False)
        self.after(done)
        return done

    def _cause(self, commands: Commands, books: Sequence[Runbook]) -> tuple[dict[str, Path], list[Done]]:
        """The run directory of each page's drill, and how the drills ended."""
        names = sorted({one.drill for one in books if one.drill})
        if not names:
            return {}, []
        directory = self.root / "drills"
        line = f"tpctl drill {' '.join(names)} --run-dir {directory}"
        return {name: directory / name for name in names}, [self._step(commands, "drills", line, DRILLS_S)]


def rehearse(one: Runbook, block: Block, commands: Commands) -> Done:
    """One block, in a way that leaves the job alive."""
    line = block.command
    if block.changes and (words := line.split())[0] == "tpctl" and words[1] in WITH_DRY_RUN:
        line += "" if "--dry-run" in words else " --dry-run"
    if block.expect.path is not None:
        line = f"{OUTPUT.sub('', line)} -o json"
    try:
        return judge(one.id, block, commands.run(line, BLOCK_S), as_json=True)
    except BookError as error:
        return Done(one.id, block, Verdict.FAIL, error.message)


def static(one: Runbook) -> list[Done]:
    """What can be said of a page without running it: its links, its codes, its drill, its diagnosis."""
    drills = {drill.id for drill in table.load()}
    checklists = {checklist.id for checklist in all_checklists()}
    faults = [
        *(f"link to nothing: {link}" for link in dead_links(one, set(all_ids()), checklists, RUNBOOKS)),
        *(f"{fm} is no failure mode" for fm in one.failure_modes if fm not in FAILURE_MODES),
        *(f"{fm} leads to another runbook" for fm in one.failure_modes if runbook_id(fm) != one.id),
        *(f"{code} leads to another runbook" for code in one.codes if runbook_id(None, code) != one.id),
    ]
    if one.drill and one.drill not in drills:
        faults.append(f"there is no drill '{one.drill}'")
    if not one.is_card and not any(block.section == "Diagnosis" and block.expect.path for block in one.blocks):
        faults.append("no block of its diagnosis shows anything that a test could look at")
    page = Block("page", "page", "", changes=False, expect=Expect())
    if faults:
        return [Done(one.id, replace(page, name=f"page-{n}"), Verdict.FAIL, text) for n, text in enumerate(faults, 1)]
    return [Done(one.id, page, Verdict.PASS, "its links, codes and drill are there")]
