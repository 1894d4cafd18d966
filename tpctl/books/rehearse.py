"""Rehearses runbooks: every block is run, safely, and against the failure that the page is about.

The failure is caused for real, by the page's drill, and {run} is what that drill's job left; where nothing causes it,
{run} is the run directory of a healthy job. {job} is that job: a small one, in a state directory of its own. What would
end it is run with --dry-run; other changes are made to it. It is drained at last, which must lose nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import load
from engine.errors import EngineError
from tpctl.books.cause import CAUSED, Causes
from tpctl.books.checklist import load_all as all_checklists
from tpctl.books.execute import PLACEHOLDER, Commands
from tpctl.books.expect import Expect
from tpctl.books.perform import BLOCK_S, Done, judge
from tpctl.books.place import RUNBOOKS, BookError
from tpctl.books.runbook import Block, Runbook, all_ids, dead_links
from tpctl.drill import table
from tpctl.exitcodes import ExitCode
from tpctl.failuremodes import FAILURE_MODES, runbook_id
from tpctl.kvreplay import config_path
from tpctl.verdict import Verdict

JOB = "rehearsal"
SMALL = ("sink.kinds=null", "geometry.height=32", "geometry.width=32", "schedule.denoising_step_list=1000", "plan.tp=2")
WITH_DRY_RUN = ("drain", "abort", "up")
OUTPUT = re.compile(r" -o (table|wide|json|yaml)\b")
DRILLS_S, START_S = 300.0, 120.0
PASSES = Expect()
HOUSE = "rehearsal"  # what stands in place of a runbook's id for the rehearsal's own steps


@dataclass
class Rehearsal:
    """Runs pages against `causes`, and tells of each block when it is done."""

    causes: Causes
    after: Callable[[Done], None]

    @property
    def root(self) -> Path:
        return self.causes.root

    def run(self, books: Sequence[Runbook]) -> list[Done]:
        """Every check and block of these pages. The job is gone when this returns, whatever happened."""
        results = [done for one in books for done in static(one)]
        for done in results:
            self.after(done)
        house = Commands({}, environment={"TPCTL_STATE_DIR": str(self.root / "state")})
        sets = " ".join(f"--set {pair}" for pair in SMALL)
        try:
            results += [self._step(house, "start", f"tpctl up --name {JOB} {sets}", START_S)]
            results += self._cause(house, books)
            results += [self._step(house, "running", f"tpctl wait {JOB} --for running --timeout 120", START_S)]
            healthy = Path(self._data(house, f"tpctl status {JOB} -o json")["run_dir"])
            results += self._blocks(house, books, healthy)
        finally:
            results += [self._step(house, "drain", f"tpctl drain {JOB}", START_S)]
        return results

    def _blocks(self, house: Commands, books: Sequence[Runbook], healthy: Path) -> list[Done]:
        """Every block. Those that ask about the job, or change it, in their order; the others beside them.

        What does not ask about the job is asked once, however many pages ask it.
        """
        results = []
        left = {name: self.causes.run_dir(name) for one in books for name in one.causes} | {"": healthy}
        beside = replace(house, given={}, done={})
        with ThreadPoolExecutor(1) as pool:
            rows: list[tuple[Runbook, Block, Future[Done] | None]] = [
                (
                    one,
                    block,
                    None if "{job}" in block.command else pool.submit(of_cause, one, block, left, beside),
                )
                for one in books
                for block in one.blocks
            ]
            for one, block, asked in rows:
                alone = replace(house, given={}, done={})
                results.append(asked.result() if asked else of_cause(one, block, left, alone))
                self.after(results[-1])
        return results

    def _step(self, commands: Commands, name: str, line: str, timeout_s: float, expect: Expect = PASSES) -> Done:
        block = Block(name, HOUSE, line, changes=True, expect=expect)
        done = judge(HOUSE, block, commands.run(line, timeout_s), as_json=False)
        self.after(done)
        return done

    def _data(self, commands: Commands, line: str) -> dict[str, Any]:
        """What a command that has to work answers. Raises BookError: it did not."""
        ran = commands.run(line, BLOCK_S)
        if ran.document is None:
            raise BookError(f"'{line}' gave no answer: {ran.stderr[-500:]}", code="TP-8115", next_step=line)
        data: dict[str, Any] = ran.document["data"]
        return data

    def _cause(self, commands: Commands, books: Sequence[Runbook]) -> list[Done]:
        """Cause what these pages are about, unless it was caused before; drills, links and the rest at the same time.

        Whether a drill was in time is for `tpctl drill` to say: here the pages say whether it caused what it should.
        """
        missing = self.causes.missing(name for one in books for name in one.causes)
        drills = [name for name in missing if name not in CAUSED]
        hosts = {drill.id for drill in table.load() if drill.hosts > 1}
        late = int(ExitCode.CHECK_FAILED)
        # Links can be cut only where there are network namespaces: a drill that could not run is no failure there.
        kinds = (
            ("drills", [name for name in drills if name not in hosts], Expect((0, late))),
            ("links", [name for name in drills if name in hosts], Expect((0, late, int(ExitCode.INCOMPLETE)))),
        )
        with ThreadPoolExecutor() as pool:
            steps = [
                pool.submit(
                    self._step,
                    commands,
                    name,
                    f"tpctl drill {' '.join(ids)} --run-dir {self.root / name}",
                    DRILLS_S,
                    expect,
                )
                for name, ids, expect in kinds
                if ids
            ]
            self.causes.cause(CAUSED.intersection(missing), load([], environ=os.environ).config)
        for name, ids, _ in kinds:
            for one in ids:
                if (self.root / name / one).is_dir():
                    (self.root / name / one).rename(self.root / one)
        return [step.result() for step in steps]


def given(job: str | None, run_dir: Path | None) -> dict[str, str]:
    """What the placeholders of a block stand for."""
    values = {} if job is None else {"job": job}
    if run_dir is not None:
        values["run"] = str(run_dir)
        with contextlib.suppress(EngineError):  # a run without a configuration: a block that needs it says so
            values["config"] = str(config_path(run_dir))
    return values


def of_cause(one: Runbook, block: Block, left: Mapping[str, Path | None], commands: Commands) -> Done:
    """One block, {run} being what its cause left; skipped where that could not be caused here."""
    run_dir = left[one.cause(block)]
    if run_dir is None and {"run", "config"} & set(PLACEHOLDER.findall(block.command)):
        return Done(one.id, block, Verdict.SKIP, f"{one.cause(block)} cannot be caused on this machine")
    return rehearse(one, block, replace(commands, given=given(JOB, run_dir)))


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
    faults += [f"there is no drill '{name}'" for name in sorted(one.causes - drills - CAUSED)]
    if not one.is_card and not any(block.section == "Diagnosis" and block.expect.path for block in one.blocks):
        faults.append("no block of its diagnosis shows anything that a test could look at")
    page = Block("page", "page", "", changes=False, expect=Expect())
    if faults:
        return [Done(one.id, replace(page, name=f"page-{n}"), Verdict.FAIL, text) for n, text in enumerate(faults, 1)]
    return [Done(one.id, page, Verdict.PASS, "its links, codes and drill are there")]
