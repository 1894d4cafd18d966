"""Errors of the command line, and how any error becomes a message, a next command and an exit code.

CliError(EngineError)     TP-70xx  2  a wrong option or file
├── LaunchError           TP-71xx  3  a launcher that could not start, or left something behind
├── SnapshotError         TP-72xx  2  a snapshot that is foreign, newer than this tool, or damaged
├── MatrixError           TP-73xx  2  a matrix file that contradicts itself
├── BaselineError         TP-74xx  2  a baseline that cannot be read
├── RunError              TP-75xx  7  no such run, or none in that directory; TP-780x what a timeline cannot draw
├── BundleError           TP-80xx  2  a support archive that cannot be written, read or trusted
├── RenderError           TP-80xx  2  a job that no batch script or manifest can be written for
├── HostsError            TP-80xx  2  a job that cannot be spread over hosts as asked, or asked for on the wrong one
└── JobError              TP-761x  2  a job that cannot be started, read or asked for this
    ├── NoJobError        TP-760x  7  no such job, or one that does not answer
    └── RefusedError      TP-762x  3  a request that the job refused
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from engine.errors import ConfigError, EngineError
from tpctl.exitcodes import ExitCode
from tpctl.failuremodes import fm_of, has_runbook, runbook_id
from tpctl.verdict import Coverage, Finding, Verdict


class CliError(EngineError):
    code = "TP-7001"
    next_step = "tpctl --help"
    cli_exit = ExitCode.USAGE


class LaunchError(CliError):
    code = "TP-7101"
    next_step = "tpctl bringup --level 1"
    cli_exit = ExitCode.CHECK_FAILED


class SnapshotError(CliError):
    code = "TP-7201"
    next_step = "tpctl env --save host.toml"


class MatrixError(CliError):
    code = "TP-7301"
    next_step = "tpctl bringup --list"


class BaselineError(CliError):
    code = "TP-7401"
    next_step = "tpctl bringup --save-baseline NAME"


class RunError(CliError):
    code = "TP-7501"
    next_step = "ls runs"
    cli_exit = ExitCode.NO_SUCH_JOB


class BundleError(CliError):
    code = "TP-8001"
    next_step = "tpctl bundle JOB"


class RenderError(CliError):
    code = "TP-8060"
    next_step = "tpctl render --help"


class HostsError(CliError):
    code = "TP-8050"
    next_step = "tpctl up --help"


class JobError(CliError):
    code = "TP-7610"
    next_step = "tpctl ps"


class NoJobError(JobError):
    code = "TP-7601"
    cli_exit = ExitCode.NO_SUCH_JOB


class RefusedError(JobError):
    code = "TP-7621"
    cli_exit = ExitCode.CHECK_FAILED


def runbook_of(record: dict[str, Any]) -> str | None:
    """The command that shows an error record's runbook; None for one that this checkout does not have."""
    name = runbook_id(fm_of(record), record.get("code"))
    return f"tpctl runbook show {name}" if name and has_runbook(name) else None


def exit_code_of(error: BaseException) -> ExitCode:
    """Usage for what the caller can mend by typing something else; a bug for what nobody foresaw."""
    if isinstance(error, CliError):
        return error.cli_exit
    if isinstance(error, ConfigError):
        return ExitCode.USAGE
    if isinstance(error, EngineError):
        return ExitCode.CHECK_FAILED
    if isinstance(error, OSError) and error.filename is not None:
        return ExitCode.USAGE
    return ExitCode.BUG


def record_of(error: BaseException) -> dict[str, Any]:
    """The error as plain data, whoever raised it."""
    if isinstance(error, EngineError):
        return error.to_record()
    if exit_code_of(error) is ExitCode.USAGE and isinstance(error, OSError):
        message, code, step = (
            f"cannot use {error.filename}: {error.strerror}",
            "TP-7002",
            "check the path and try again",
        )
    else:
        message, code = f"{type(error).__name__}: {error}", "TP-7000"
        step = "run the same command with --debug and report what it prints"
    return {
        "type": type(error).__name__,
        "code": code,
        "fm": None,
        "exit_code": int(exit_code_of(error)),
        "message": message,
        "where": None,
        "ids": {},
        "evidence": {},
        "next": step,
    }


def describe(record: dict[str, Any]) -> list[str]:
    """The lines a person reads: code, sentence, evidence, next command, runbook."""
    kind = "bug" if record["code"] == "TP-7000" else "error"
    lines = [f"{kind} {record['code']}: {record['message']}"]
    facts = {**record.get("ids", {}), **record.get("evidence", {})}
    if facts:
        lines.append("  evidence: " + ", ".join(f"{key}={value}" for key, value in facts.items()))
    lines.append(f"  next: {record['next']}")
    runbook = runbook_of(record)
    if runbook:
        lines.append(f"  runbook: {runbook}")
    return lines


def report(error: BaseException) -> int:
    """Print an error where the command's options want it; returns the exit code."""
    from tpctl.output import CURRENT, Envelope, Format, Output

    out = CURRENT.get(None) or Output()
    record = record_of(error)
    if out.debug:
        traceback.print_exception(error, file=sys.stderr)
    for line in describe(record):
        out.complain(line)
    if out.format in (Format.json, Format.jsonl, Format.yaml):
        finding = Finding(
            record["code"], Verdict.FAIL, record["message"], next=record["next"], evidence=record["evidence"]
        )
        out.emit(
            Envelope(
                "tpctl.error",
                Verdict.UNKNOWN,
                {"error": record, "exit_code": int(exit_code_of(error)), "runbook": runbook_of(record)},
                (finding,),
                Coverage(0, 1),
                (record["next"],),
            )
        )
    return int(exit_code_of(error))
