"""The exit codes of `tpctl`, in one table; the worst wins."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from tpctl.verdict import Verdict


class ExitCode(IntEnum):
    PASS = 0
    BUG = 1
    USAGE = 2
    CHECK_FAILED = 3
    WARNINGS = 4
    INCOMPLETE = 5
    DEADLINE = 6
    NO_SUCH_JOB = 7
    DRAINED_WITH_LOSS = 8
    INTERRUPTED = 130


MEANING: dict[ExitCode, str] = {
    ExitCode.PASS: "pass",
    ExitCode.BUG: "a bug in tpctl",
    ExitCode.USAGE: "usage: a wrong option, argument or configuration",
    ExitCode.CHECK_FAILED: "a check failed",
    ExitCode.WARNINGS: "warnings only (with --strict)",
    ExitCode.INCOMPLETE: "incomplete or unknown: a check could not run",
    ExitCode.DEADLINE: "deadline passed",
    ExitCode.NO_SUCH_JOB: "no such job, or unreachable",
    ExitCode.DRAINED_WITH_LOSS: "drained, with loss",
    ExitCode.INTERRUPTED: "interrupted",
}

# From best to worst, where several apply. A proven fault outranks a passed deadline, which may have hidden one.
SEVERITY = (
    ExitCode.PASS,
    ExitCode.WARNINGS,
    ExitCode.INCOMPLETE,
    ExitCode.DRAINED_WITH_LOSS,
    ExitCode.NO_SUCH_JOB,
    ExitCode.DEADLINE,
    ExitCode.CHECK_FAILED,
    ExitCode.USAGE,
    ExitCode.BUG,
    ExitCode.INTERRUPTED,
)


def worst_code(codes: Iterable[ExitCode]) -> ExitCode:
    return max(codes, key=SEVERITY.index, default=ExitCode.INCOMPLETE)


def for_verdict(verdict: Verdict, strict: bool = False) -> ExitCode:
    """The code of an overall verdict. `strict` makes warnings count."""
    if verdict is Verdict.FAIL:
        return ExitCode.CHECK_FAILED
    if verdict in (Verdict.UNKNOWN, Verdict.UNCHECKED):
        return ExitCode.INCOMPLETE
    if verdict is Verdict.WARN and strict:
        return ExitCode.WARNINGS
    return ExitCode.PASS
