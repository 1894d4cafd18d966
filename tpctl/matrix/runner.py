"""Runs the cases of a matrix, one after another: real processes, then the gates."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engine.config import EngineConfig, from_dict
from engine.errors import ConfigError
from engine.plan import PP_PLANS
from engine.process import Process
from tpctl.drill import table as drilltable
from tpctl.drill.ranks import Nursery
from tpctl.drill.runner import DrillRunner
from tpctl.errors import LaunchError
from tpctl.launch import local
from tpctl.launch.environment import rank_environment
from tpctl.matrix import gates, ppgates
from tpctl.matrix.case import Case
from tpctl.matrix.cases import Matrix
from tpctl.matrix.cause import Cause, first_cause
from tpctl.matrix.metrics import metrics
from tpctl.matrix.observation import Observation
from tpctl.remains import tail
from tpctl.reports import read_reports
from tpctl.trace.files import draw
from tpctl.verdict import Coverage, Finding, Verdict, worst

ASSETS_DEADLINE_S = 600.0


@dataclass(frozen=True)
class CaseResult:
    """One case, judged."""

    case: Case
    run_dir: Path
    findings: tuple[Finding, ...]
    metrics: Mapping[str, Any]
    cause: Cause | None = None
    timed_out: bool = False
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """SKIP where that is all there is to say: the case could not run here, and nobody has to answer for it."""
        if {finding.verdict for finding in self.findings} == {Verdict.SKIP}:
            return Verdict.SKIP
        return worst(finding.verdict for finding in self.findings)

    @property
    def coverage(self) -> Coverage:
        return Coverage.of(finding.verdict for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.case.id,
            "title": self.case.title,
            "plan": self.case.plan,
            "tp": self.case.tp,
            "chunks": self.case.chunks,
            "reference": self.case.reference,
            "verdict": self.verdict.value,
            "coverage": {"checked": self.coverage.checked, "expected": self.coverage.expected},
            "run_dir": str(self.run_dir),
            "findings": [finding.to_dict() for finding in self.findings],
            "metrics": dict(self.metrics),
            "cause": self.cause.to_dict() if self.cause else None,
            "outputs": dict(self.outputs),
        }


class Progress(Protocol):
    """Who watches. `tick` comes a few times a second."""

    def start(self, case: Case) -> None: ...
    def tick(self, case: Case, elapsed_s: float) -> None: ...
    def done(self, result: CaseResult) -> None: ...


@dataclass(frozen=True)
class Runner:
    """`base` is the resolved configuration that every case changes; `endpoint` goes to the launcher."""

    base: EngineConfig
    run_dir: Path
    progress: Progress
    endpoint: str = "localhost:0"
    fail_fast: bool = False
    module: str = "engine.worker"

    def run(self, matrix: Matrix, results: list[CaseResult]) -> None:
        """Every case, appended to `results`; after a failure too, unless `fail_fast`. What did not run is UNCHECKED.

        Raises:
            KeyboardInterrupt: after the running case's processes are gone; `results` keeps what was judged before.
        """
        seen: dict[str, Observation] = {}
        stopped = False
        with contextlib.ExitStack() as resources:
            drills: DrillRunner | None = None
            for case in matrix.cases:
                if stopped:
                    results.append(self.not_run(case, "an earlier case failed, and --fail-fast was given"))
                    continue
                self.progress.start(case)
                if case.kind == "drill":
                    if drills is None:
                        nursery = resources.enter_context(Nursery(self.run_dir / "nursery.log"))
                        drills = DrillRunner(nursery, self.base, self.run_dir)
                    result = self._drill(case, drills)
                else:
                    result = self._parity(case) if case.kind == "parity" else self._case(case, seen)
                results.append(result)
                self.progress.done(result)
                stopped = self.fail_fast and result.verdict not in (Verdict.PASS, Verdict.WARN)

    def not_run(self, case: Case, why: str) -> CaseResult:
        finding = Finding("run", Verdict.UNCHECKED, f"not run: {why}")
        return CaseResult(case, self.run_dir / case.id, (finding,), {})

    def configuration(self, case: Case) -> dict[str, dict[str, Any]]:
        """The case's configuration as plain data, not yet validated: a case may ask for what must be refused."""
        directory = (self.run_dir / case.id).resolve()
        data = self.base.to_dict()
        data["plan"] |= {"tp_plan": case.plan, "tp": case.tp}
        data["run"] |= {"chunks": case.chunks, "record_latents": True}
        data["sink"]["directory"] = str(directory)
        if case.events:
            data["run"]["timeline"] = str(directory / "timeline.toml")
        for dotted, value in case.config.items():
            section, key = dotted.split(".", 1)
            data[section][key] = value
        return data

    def _case(self, case: Case, seen: dict[str, Observation]) -> CaseResult:
        directory = self.run_dir / case.id
        directory.mkdir(parents=True, exist_ok=True)
        config_path = self.write_files(case, directory)
        blank = Observation(
            case,
            directory,
            reference=seen.get(case.reference) if case.reference else None,
            other=seen.get(case.differs_from) if case.differs_from else None,
        )
        try:
            config = from_dict(self.configuration(case), case.id)
        except ConfigError as error:
            found = replace(blank, refused=error.to_record())
            seen[case.id] = found
            return self._judge(found)
        if case.expect == "refused":
            return self._judge(blank)
        try:
            outcome = local.run(
                local.LaunchSpec(
                    nproc=config.world_size,
                    run_dir=directory,
                    # A bring-up that is killed takes its ranks along.
                    arguments=(
                        *("--config", str(config_path), "--run-dir", str(directory)),
                        *("--supervisor", str(Process.of(os.getpid()))),
                    ),
                    deadline_s=case.deadline_s,
                    module=self.module,
                    rdzv_endpoint=self.endpoint,
                    rdzv_id=case.id,
                ),
                lambda elapsed_s: self.progress.tick(case, elapsed_s),
            )
        except LaunchError as error:
            found = replace(blank, launch_error=error.to_record())
        else:
            found = replace(blank, outcome=outcome, reports=read_reports(directory))
        seen[case.id] = found
        result = self._judge(found)
        if found.outcome is None or config.plan.tp_plan not in PP_PLANS:
            return result
        return replace(result, outputs=draw(directory, f"{case.id}: {case.title}").outputs)

    def _judge(self, seen: Observation) -> CaseResult:
        case = seen.case
        if (lacking := _lacking(seen)) is not None:
            return CaseResult(case, seen.run_dir, (lacking,), metrics(seen, ()))
        findings = tuple(gates.evaluate(name, seen) for name in case.gates)
        held_back = ppgates.held_back(seen)
        findings += (held_back,) if held_back is not None else ()
        cause = None
        if case.expect == "pass":
            if seen.refused is not None:
                record = seen.refused
                failed = Finding("launch", Verdict.FAIL, f"refused: {record['message']}", record["code"])
                findings = (failed, *findings)
                cause = Cause(None, record["message"], record["code"], next=record["next"])
            elif seen.launch_error is not None:
                failed = Finding("launch", Verdict.FAIL, str(seen.launch_error["message"]), seen.launch_error["code"])
                findings = (failed, *findings)
            cause = cause or first_cause(seen)
        timed_out = seen.outcome is not None and seen.outcome.timed_out
        return CaseResult(case, seen.run_dir, findings, metrics(seen, findings), cause, timed_out)

    def write_files(self, case: Case, directory: Path) -> Path:
        """`config.toml`, and `timeline.toml` where the case has events."""
        import tomli_w

        path = directory / "config.toml"
        path.write_text(tomli_w.dumps(self.configuration(case)), encoding="utf-8")
        if case.events:
            text = tomli_w.dumps({"event": [dict(event) for event in case.events]})
            (directory / "timeline.toml").write_text(text, encoding="utf-8")
        return path

    def _drill(self, case: Case, drills: DrillRunner) -> CaseResult:
        """A broken job, and how it died: each demand of the table of drills is a gate."""
        started = time.monotonic()
        (drill,) = (drill for drill in drilltable.load() if drill.id == case.id)
        result = drills.run(drill)
        record = result.to_dict()
        figures = {key: record[key] for key in ("first_failure_ms", "gone_ms", "code", "fm", "blame")}
        return CaseResult(
            case, self.run_dir / case.id, result.findings, {**figures, "wall_s": time.monotonic() - started}
        )

    def _parity(self, case: Case) -> CaseResult:
        """The ranks of a launch of this size, before it: same configuration, versions and code?"""
        from tpctl.parityprobe import probe
        from tpctl.paritytable import compare, findings, judge

        started = time.monotonic()
        tables = probe(from_dict(self.configuration(case), case.id))
        rows = compare(tables)
        verdict, coverage = judge(rows, len(tables), case.tp)
        words = f"{coverage.checked} of {coverage.expected} values compared over {len(tables)} ranks"
        found = (Finding("parity", verdict, words, coverage.checked, coverage.expected), *findings(rows))
        return CaseResult(case, self.run_dir / case.id, found, {"wall_s": time.monotonic() - started})


def _lacking(seen: Observation) -> Finding | None:
    """Every rank refused to start for what this host lacks, and the case said that it may: it is skipped, with why."""
    errors = [report.get("error") or {} for report in seen.reports.values()]
    if not seen.case.skip_on or len(errors) != seen.case.ranks:
        return None
    if {error.get("code") for error in errors} != {seen.case.skip_on}:
        return None
    return Finding("launch", Verdict.SKIP, str(errors[0]["message"]), seen.case.skip_on)


def make_assets(config: EngineConfig, run_dir: Path, deadline_s: float = ASSETS_DEADLINE_S) -> None:
    """Make the tiny preset's weights and tokenizer before any case, so that no case is timed while doing it.

    Raises:
        LaunchError: it failed or took too long; the log's last lines are the evidence.
    """
    import tomli_w

    run_dir.mkdir(parents=True, exist_ok=True)
    path, log = run_dir / "config.toml", run_dir / "assets.log"
    path.write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "engine.assets", "--config", str(path)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=rank_environment()
        )
        try:
            code: int | None = process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=local.REAP_S)
    if code != 0:
        why = f"ended with {code}" if code is not None else f"took longer than {deadline_s:g} s"
        raise LaunchError(
            f"making the weights and tokenizer {why}; log: {log}",
            code="TP-7105",
            evidence={"last_lines": " / ".join(tail(log)[-3:])},
            next_step="tpctl config check",
        )
