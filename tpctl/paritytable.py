"""Compare values by source (host or rank). Pure: a mapping in, rows out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.verdict import Coverage, Finding, Verdict, worst

MUST, SHOULD, INFO = "must", "should", "info"

# By the longest matching prefix. `must`: ranks that differ here compute different things or strand each other.
SEVERITY: dict[str, str] = {
    "": INFO,
    "config.": MUST,
    "versions.": SHOULD,
    "versions.torch": MUST,
    "versions.transformers": MUST,
    "versions.diffusers": MUST,
    "versions.numpy": MUST,
    "versions.safetensors": MUST,
    "code.engine_sha256": MUST,
    "code.version": MUST,
    "code.commit": SHOULD,
    "python.minor": MUST,
    "python.version": SHOULD,
    "host.machine": MUST,
    "host.cpu": SHOULD,
    "host.kernel": SHOULD,
    "gpu.": SHOULD,
    "gpu.names": MUST,
    "gpu.count": MUST,
    "gpu.driver": MUST,
    "threads.": SHOULD,
    "environment.": SHOULD,
    "environment.NCCL_": MUST,
    "environment.TORCH_NCCL_": MUST,
    "environment.TPCTL_": MUST,
    "environment.CUDA_VISIBLE_DEVICES": INFO,
    "effective.": MUST,
    "generator.": MUST,
    "config_error.": MUST,
}
# Absent and unset are the same thing for these; for all others a missing value cannot be compared.
ABSENT_IS_A_VALUE = ("environment.", "config_error.")
UNSET = "(unset)"
MISSING = "(missing)"


def severity_of(key: str) -> str:
    return SEVERITY[max((prefix for prefix in SEVERITY if key.startswith(prefix)), key=len)]


@dataclass(frozen=True)
class Row:
    """One key over all sources. `majority` is None where no value has more than half the sources."""

    key: str
    severity: str
    verdict: Verdict
    values: Mapping[str, str]
    majority: str | None
    minority: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "severity": self.severity,
            "verdict": self.verdict.value,
            "values": dict(self.values),
            "majority": self.majority,
            "minority": list(self.minority),
        }


def compare(tables: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Every key of every source, in order of first appearance."""
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    return [_row(key, tables) for key in keys]


def _row(key: str, tables: Mapping[str, Mapping[str, Any]]) -> Row:
    absent = UNSET if key.startswith(ABSENT_IS_A_VALUE) else MISSING
    values = {source: _text(table[key]) if key in table else absent for source, table in tables.items()}
    counts = {value: list(values.values()).count(value) for value in values.values()}
    leader = max(counts, key=lambda value: counts[value])
    majority = leader if counts[leader] * 2 > len(values) else None
    minority = tuple(source for source, value in values.items() if majority is not None and value != majority)
    severity = severity_of(key)
    if len(counts) == 1 or severity == INFO:
        verdict = Verdict.PASS
    elif MISSING in counts:
        verdict = Verdict.UNKNOWN
    else:
        verdict = Verdict.FAIL if severity == MUST else Verdict.WARN
    return Row(key, severity, verdict, values, majority, minority)


def findings(rows: list[Row]) -> tuple[Finding, ...]:
    """A finding for each row that is not healthy. With no majority it names the difference, not a culprit."""
    found = []
    for row in rows:
        if row.verdict is Verdict.PASS:
            continue
        said = ", ".join(f"{source}={value}" for source, value in row.values.items())
        blame = f"; differs: {', '.join(row.minority)}" if row.minority else ""
        found.append(
            Finding(
                f"parity.{row.key}",
                row.verdict,
                f"{row.key} is not the same everywhere: {said}{blame}",
                value=dict(row.values),
                limit=row.majority,
                severity=row.severity,
            )
        )
    return tuple(found)


def judge(rows: list[Row], sources: int, expected_sources: int) -> tuple[Verdict, Coverage]:
    """Overall verdict; a source that did not answer leaves its values UNCHECKED, whatever the others say."""
    verdicts = [row.verdict for row in rows]
    coverage = Coverage.of(verdicts)
    checked, expected = coverage.checked * sources, len(rows) * expected_sources
    if sources < expected_sources or sources < 2:
        verdicts.append(Verdict.UNCHECKED)
    return worst(verdicts), Coverage(checked, expected)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
