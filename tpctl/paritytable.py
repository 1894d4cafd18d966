"""Compare values by source (host or rank). Pure: a mapping in, rows out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.verdict import ORDER, Coverage, Finding, Verdict, worst

MUST, SHOULD, INFO = "must match", "should match", "information"

# By the longest matching prefix. Must match: ranks that differ here compute different things or strand each other.
SEVERITY: dict[str, str] = {
    "": INFO,
    "config.": MUST,
    "plan.": MUST,
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
    "python.implementation": SHOULD,
    "host.machine": MUST,
    "host.cpu": SHOULD,
    "host.kernel": SHOULD,
    "gpu.": SHOULD,
    "gpu.names": MUST,
    "gpu.count": MUST,
    "gpu.driver": MUST,
    "threads.": SHOULD,
    "environment.": SHOULD,
    "environment.ATEN_CPU_CAPABILITY": MUST,
    "environment.CUBLAS_WORKSPACE_CONFIG": MUST,
    "environment.DNNL_MAX_CPU_ISA": MUST,
    "environment.MKL_CBWR": MUST,
    "environment.NVIDIA_TF32_OVERRIDE": MUST,
    "environment.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": MUST,
    "environment.NCCL_": MUST,
    "environment.NCCL_DEBUG": INFO,
    "environment.TORCH_NCCL_": MUST,
    "environment.TPCTL_": MUST,
    "environment.CUDA_VISIBLE_DEVICES": INFO,
    "environment.TORCH_LOGS": INFO,
    "reported.environment.": MUST,
    "effective.": MUST,
    "generator.": MUST,
    "config_error.": MUST,
    # Of living processes. Ranks are pinned apart on purpose, and rank 0 has threads of its own.
    "process.": SHOULD,
    "process.cpus": INFO,
    "process.cpus_usable": SHOULD,
    "process.threads": INFO,
    "limit.": SHOULD,
    "limit.core": INFO,
    "limit.stack": INFO,
    # Build ids. Rank 0 may load more than the others; what all need to compute alike must be the same.
    "library.": SHOULD,
    "library.libtorch": MUST,
    "library.libc10": MUST,
    "library.libgomp": MUST,
    "library.libcu": MUST,
    "library.libnccl": MUST,
}
UNSET = "(unset)"
MISSING = "(missing)"
NOT_LOADED = "(not loaded)"
# Absent is a value of its own for these; for all others a missing value cannot be compared.
ABSENT = {"environment.": UNSET, "config_error.": UNSET, "library.": NOT_LOADED, "path.": NOT_LOADED}
LOADED_BY_ALL = ("library.libtorch", "library.libc10")
Sees = Callable[[str], bool]


def severity_of(key: str) -> str:
    return SEVERITY[max((prefix for prefix in SEVERITY if key.startswith(prefix)), key=len)]


@dataclass(frozen=True)
class Row:
    """One key over all sources. `majority` is None where no value has more than half of the known values.

    `coverage` is how many sources told their value, of how many there are.
    """

    key: str
    severity: str
    verdict: Verdict
    values: Mapping[str, str]
    majority: str | None
    minority: tuple[str, ...]
    coverage: Coverage

    @property
    def differs(self) -> bool:
        return len(set(self.values.values())) > 1

    def holders(self) -> dict[str, list[str]]:
        """Value -> who has it, the most common first."""
        found: dict[str, list[str]] = {}
        for source, value in self.values.items():
            found.setdefault(value, []).append(source)
        return dict(sorted(found.items(), key=lambda item: (item[0] == MISSING, -len(item[1]))))

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "severity": self.severity,
            "verdict": self.verdict.value,
            "values": dict(self.values),
            "majority": self.majority,
            "minority": list(self.minority),
            "coverage": {"checked": self.coverage.checked, "expected": self.coverage.expected},
        }


def compare(tables: Mapping[str, Mapping[str, Any]], sees: Mapping[str, Sees] | None = None) -> list[Row]:
    """Every key of every source, in order of first appearance.

    `sees` tells for a source whether it could have seen a key at all: where it could not, absence says nothing.
    """
    keys = dict.fromkeys(key for table in tables.values() for key in table)
    return [_row(key, tables, sees or {}) for key in keys]


def _row(key: str, tables: Mapping[str, Mapping[str, Any]], sees: Mapping[str, Sees]) -> Row:
    absent = next((word for prefix, word in ABSENT.items() if key.startswith(prefix)), MISSING)
    values = {}
    for source, table in tables.items():
        blind = source in sees and not sees[source](key)
        values[source] = _text(table[key]) if key in table else MISSING if blind else absent
    known = [value for value in values.values() if value != MISSING]
    value, votes = Counter(known).most_common(1)[0]
    majority = value if votes * 2 > len(known) else None
    minority = tuple(s for s, v in values.items() if majority is not None and v not in (majority, MISSING))
    severity = severity_of(key)
    if key.startswith("library.") and not key.startswith(LOADED_BY_ALL) and len({*known} - {NOT_LOADED}) == 1:
        severity = INFO  # the same wherever it is loaded: rank 0 has parts that the others have not
    if severity == INFO:
        verdict = Verdict.PASS
    elif len(set(known)) > 1:
        verdict = Verdict.FAIL if severity == MUST else Verdict.WARN
    else:
        verdict = Verdict.PASS if len(known) == len(values) else Verdict.UNKNOWN
    return Row(key, severity, verdict, values, majority, minority, Coverage(len(known), len(values)))


def findings(rows: list[Row]) -> tuple[Finding, ...]:
    """A finding for each row that is not healthy, the worst first. With no majority: the difference, no culprit."""
    found = []
    for row in rows:
        if row.verdict is Verdict.PASS:
            continue
        said = ", ".join(f"{spans(sources)}={value}" for value, sources in row.holders().items())
        blame = f"; differs: {spans(row.minority)}" if row.minority else ""
        found.append(
            Finding(
                f"parity.{row.key}",
                row.verdict,
                f"{row.key} ({row.severity}) is not the same everywhere: {said}{blame}"
                if row.verdict is not Verdict.UNKNOWN
                else f"{row.key} ({row.severity}) is not known everywhere: {said}",
                value=dict(row.values),
                limit=row.majority,
                severity=row.severity,
            )
        )
    return tuple(sorted(found, key=lambda finding: -ORDER.index(finding.verdict)))


def judge(rows: list[Row], sources: int, expected_sources: int) -> tuple[Verdict, Coverage]:
    """Overall verdict; a source that did not answer leaves its values UNCHECKED, whatever the others say."""
    verdicts = [row.verdict for row in rows]
    if sources < expected_sources or sources < 2 or not rows:
        verdicts.append(Verdict.UNCHECKED)
    checked = sum(row.coverage.checked for row in rows)
    return worst(verdicts), Coverage(checked, max(checked, len(rows) * expected_sources))


def spans(sources: list[str] | tuple[str, ...]) -> str:
    """`rank0, rank1, rank2, rank7` as `rank0..rank2, rank7`: names that only count up are told by their ends."""
    runs: list[list[str]] = []
    for name in sources:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _follows(before: str, name: str) -> bool:
    stem, next_stem = before.rstrip("0123456789"), name.rstrip("0123456789")
    first, second = before[len(stem) :], name[len(next_stem) :]
    return stem == next_stem and bool(first and second) and int(second) == int(first) + 1


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
