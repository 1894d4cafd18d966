"""Results for people and for CI: the table, the lines about failures, JUnit."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.plan import PP_PLANS
from tpctl.matrix.metrics import MIB
from tpctl.matrix.runner import CaseResult
from tpctl.output import Column, Table
from tpctl.verdict import ANSWERED, Verdict

COLUMNS = (
    Column("case", "id"),
    Column("verdict", "verdict"),
    Column("plan", "plan", narrow=False),
    Column("tp", "tp", narrow=False, right=True),
    Column("regime", "regime", narrow=False),
    Column("rel.err", "latents_error", right=True),
    Column("pixel err", "pixels_error", narrow=False, right=True),
    Column("calls", "calls", narrow=False, right=True),
    Column("frames", "frames", narrow=False, right=True),
    Column("MiB", "worker_mib", right=True),
    Column("rank 0 MiB", "leader_mib", narrow=False, right=True),
    Column("ready s", "worker_ready_s", right=True),
    Column("rank 0 ready s", "leader_ready_s", narrow=False, right=True),
    Column("graphs", "graphs", narrow=False, right=True),
    Column("compile s", "compile_s", narrow=False, right=True),
    Column("period ms", "period_p50_ms", right=True),
    Column("p90", "period_p90_ms", narrow=False, right=True),
    Column("p99", "period_p99_ms", narrow=False, right=True),
    Column("a ms", "t_a_p50_ms", narrow=False, right=True),
    Column("b ms", "t_b_p50_ms", narrow=False, right=True),
    Column("c ms", "t_c_p50_ms", narrow=False, right=True),
    Column("overlap", "overlap_score", narrow=False, right=True),
    Column("stage 0 ms", "stage0_p50_ms", narrow=False, right=True),
    Column("stage 1 ms", "stage1_p50_ms", narrow=False, right=True),
    Column("idle ms", "mesh_idle_p50_ms", narrow=False, right=True),
    Column("fps", "fps", right=True),
    Column("named ms", "first_failure_ms", narrow=False, right=True),
    Column("gone ms", "gone_ms", narrow=False, right=True),
    Column("gates", "gates", narrow=False, right=True),
    Column("down s", "teardown_s", narrow=False, right=True),
    Column("wall s", "wall_s", narrow=False, right=True),
    Column("note", "note"),
)


MEASURED = ("coupling", "deeper-only-waits", "send-after-decode")  # gates whose figures are the point of their case


def table(results: Sequence[CaseResult]) -> Table:
    """One row a case. MiB and ready s are the worker's: the largest of all ranks but 0, or the only rank."""
    return Table(COLUMNS, [_row(result) for result in results])


def _row(result: CaseResult) -> dict[str, Any]:
    figures = result.metrics
    ranks = figures.get("ranks", {})
    calls = (figures.get("calls_observed"), figures.get("calls_expected"))
    return {
        **figures,
        "id": result.case.id,
        "verdict": result.verdict.value,
        "plan": result.case.plan,
        "tp": result.case.tp,
        "latents_error": _short_error(figures.get("latents_error")),
        "calls": f"{calls[0]}/{calls[1]}" if calls[1] is not None else None,
        "worker_mib": _mib(figures.get("worker_peak_bytes")),
        "leader_mib": _mib(figures.get("leader_peak_bytes")),
        "leader_ready_s": ranks.get("0", {}).get("ready_s"),
        "gates": f"{result.coverage.checked}/{result.coverage.expected}",
        "note": note(result),
    }


def note(result: CaseResult) -> str:
    """A word or two: what failed, or what kind of case it is. Regime R0, another video than R0a, is always named."""
    words = _note(result)
    if result.metrics.get("regime") != "R0":
        return words
    return f"R0: anchors from latents{', ' + words if words else ''}"


def _note(result: CaseResult) -> str:
    bad = [finding.id for finding in result.findings if finding.verdict not in (Verdict.PASS, Verdict.SKIP)]
    if bad:
        return bad[0] + (f" +{len(bad) - 1}" if len(bad) > 1 else "")
    if result.verdict is Verdict.SKIP:
        return "skipped"
    if result.case.expect == "refused":
        return "refused"
    if result.case.kind == "run" and result.case.reference is None and result.case.plan not in PP_PLANS:
        return "reference"
    if result.case.kind == "drill":
        figures = result.metrics
        gone = f", gone in {figures['gone_ms']:.0f} ms" if figures.get("gone_ms") is not None else ""
        if figures.get("blame") == "nobody":
            return "the stream goes on"
        return f"{figures.get('code') or ''} {figures.get('fm') or ''}".strip() + gone
    words = []
    if (score := result.metrics.get("overlap_score")) is not None:
        words.append(f"overlap {score:.2f}")
    if made := result.metrics.get("graphs"):
        words.append(f"compiled: {made} graph{'s' if made > 1 else ''}")
    return ", ".join(words)


def remarks(results: Sequence[CaseResult]) -> list[str]:
    """What measured cases have to say even where all is well."""
    return [
        f"{result.case.id}: {finding.message}"
        for result in results
        for finding in result.findings
        if finding.id in MEASURED and finding.verdict is Verdict.PASS
    ]


def explain(results: Sequence[CaseResult]) -> list[str]:
    """For each case that is not healthy: its findings, then the first cause."""
    lines: list[str] = []
    for result in results:
        if result.verdict is Verdict.SKIP:
            lines.append(f"{result.case.id}: SKIP: {result.findings[0].message}")
            continue
        if result.verdict is Verdict.PASS:
            continue
        lines += ["", f"{result.case.id}: {result.verdict}  ({result.run_dir})"]
        for finding in result.findings:
            if finding.verdict not in (Verdict.PASS, Verdict.SKIP):
                lines.append(f"  {finding.verdict:<9} {finding.id}: {finding.message}")
        if result.cause is not None:
            lines += [f"  {line}" for line in result.cause.lines()]
    return lines


def write_junit(results: Sequence[CaseResult], path: Path, name: str) -> None:
    """One testsuite a case, one testcase a gate. UNKNOWN and UNCHECKED are errors, so CI does not pass on them."""
    root = ET.Element("testsuites", name=name)
    for result in results:
        verdicts = [finding.verdict for finding in result.findings]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=result.case.id,
            tests=str(len(verdicts)),
            failures=str(verdicts.count(Verdict.FAIL)),
            errors=str(sum(v not in ANSWERED and v is not Verdict.SKIP for v in verdicts)),
            skipped=str(verdicts.count(Verdict.SKIP)),
            time=f"{result.metrics.get('wall_s') or 0:.3f}",
        )
        for finding in result.findings:
            case = ET.SubElement(suite, "testcase", classname=result.case.id, name=finding.id)
            if finding.verdict is Verdict.FAIL:
                cause = "\n".join(result.cause.lines()) if result.cause else finding.message
                ET.SubElement(case, "failure", message=finding.message).text = cause
            elif finding.verdict is Verdict.SKIP:
                ET.SubElement(case, "skipped", message=finding.message)
            elif finding.verdict not in ANSWERED:
                ET.SubElement(case, "error", message=f"{finding.verdict}: {finding.message}")
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _mib(size: int | None) -> str | None:
    return None if size is None else f"{size / MIB:.0f}"


def _short_error(error: float | None) -> str | None:
    return None if error is None else f"{error:.0e}" if error else "0"
