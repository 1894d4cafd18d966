"""Verdicts and findings. Unknown is never healthy, and coverage is part of the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What a check says. SKIP has a reason and was not asked for; UNCHECKED was asked for and did not run."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"
    UNCHECKED = "UNCHECKED"
    UNKNOWN = "UNKNOWN"


# From best to worst. FAIL outranks UNKNOWN: a proven fault is more urgent than a missing answer.
ORDER = (Verdict.SKIP, Verdict.PASS, Verdict.WARN, Verdict.UNCHECKED, Verdict.UNKNOWN, Verdict.FAIL)
ANSWERED = frozenset({Verdict.PASS, Verdict.WARN, Verdict.FAIL})


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of many. Nothing at all, or skips alone, is UNCHECKED: no check stands behind it."""
    found = max(verdicts, key=ORDER.index, default=Verdict.UNCHECKED)
    return Verdict.UNCHECKED if found is Verdict.SKIP else found


@dataclass(frozen=True)
class Finding:
    """One check's answer: `value` against `limit`, in the unit that the message names."""

    id: str
    verdict: Verdict
    message: str
    value: Any = None
    limit: Any = None
    where: str | None = None
    severity: str | None = None
    next: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "verdict": self.verdict.value,
            "message": self.message,
            "value": self.value,
            "limit": self.limit,
            "where": self.where,
            "severity": self.severity,
            "next": self.next,
            "evidence": dict(self.evidence),
        }


@dataclass(frozen=True)
class Coverage:
    """How many checks gave an answer, of how many that should have."""

    checked: int
    expected: int

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Coverage:
        """A SKIP is not expected to answer; UNKNOWN and UNCHECKED are, and did not."""
        counted = [verdict for verdict in verdicts if verdict is not Verdict.SKIP]
        return cls(sum(verdict in ANSWERED for verdict in counted), len(counted))
