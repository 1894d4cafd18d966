"""The failure modes: one table of what each is called in words, which runbook it has, and what to type next.

An error that names no failure mode of its own is looked up by its code; the longest prefix wins. A damaged frame and
a full disk are none of the named failure modes: they have a runbook all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FailureMode:
    """`next` may hold {run}, which stands for the run directory."""

    words: str
    runbook: str
    next: str = ""


KV_AUDIT, PARITY = "tpctl kv-audit {run}", "tpctl parity-check {run}"
LINK_LOST = "link-lost"  # a loss that convicts no rank
KERNEL_LOG = "dmesg | grep -i -E 'killed process|segfault'"
CONFIG = "tpctl config check -c {run}/config.toml"

FAILURE_MODES: dict[str, FailureMode] = {
    "FM-01": FailureMode("plan or role mismatch", "parity-mismatch", PARITY),
    "FM-02": FailureMode("call-count mismatch", "hang-mid-stream", KV_AUDIT),
    "FM-03": FailureMode("conditional collective", "parity-mismatch", PARITY),
    "FM-04": FailureMode("throw after header", "hang-mid-stream"),
    "FM-06": FailureMode("missing override, fallback", "drift"),
    "FM-07": FailureMode("unsupported dtype found late", "hang-mid-stream"),
    "FM-08": FailureMode("ad-hoc broadcast", "hang-mid-stream"),
    "FM-10": FailureMode("stale epoch or cache reset drift", "kv-digest-mismatch", KV_AUDIT),
    "FM-15": FailureMode("stale override reused", "drift", KV_AUDIT),
    "FM-17": FailureMode("stale conditioning", "drift", KV_AUDIT),
    "FM-20": FailureMode("second caller on the groups", "hang-mid-stream"),
    "FM-21": FailureMode("comms thread stuck", "drain-stuck"),
    "FM-22": FailureMode("wrong group", "hang-mid-stream"),
    "FM-23": FailureMode("leader failed before its broadcast", "hang-mid-stream"),
    "FM-30": FailureMode("input drift", "drift", KV_AUDIT),
    "FM-31": FailureMode("weight drift", "drift", CONFIG),
    "FM-32": FailureMode("cache lifecycle drift", "kv-digest-mismatch", KV_AUDIT),
    "FM-40": FailureMode("peer lost", "rank-lost", KERNEL_LOG),
    "FM-41": FailureMode("peer frozen", "rank-frozen", "dmesg | tail -n 50"),
    "FM-50": FailureMode("compile asymmetry", "compile-regression", PARITY),
    "FM-51": FailureMode("graph break", "compile-regression"),
}


@dataclass(frozen=True)
class CodeGroup:
    """`first`: the code's page stands before the one of the failure mode, which is wider."""

    fm: str | None
    runbook: str | None
    first: bool = False


# By prefix of an error's code.
CODES: dict[str, CodeGroup] = {
    # A compiler, or a compiled kernel, that was asked for and cannot be had on this host.
    "TP-1031": CodeGroup(None, "compile-regression"),
    "TP-1032": CodeGroup(None, "compile-regression"),
    # A repeated or older call_id is a frame of the past: the nearest failure mode that has a name.
    "TP-2206": CodeGroup("FM-10", "kv-digest-mismatch"),
    "TP-2208": CodeGroup("FM-10", "kv-digest-mismatch"),
    "TP-2209": CodeGroup("FM-10", "kv-digest-mismatch"),
    "TP-22": CodeGroup(None, "wire-upgrade"),
    "TP-3001": CodeGroup(None, "rank-lost"),
    "TP-32": CodeGroup(None, "hang-at-start", first=True),
    "TP-3301": CodeGroup(None, "parity-mismatch"),
    "TP-40": CodeGroup(None, "hang-at-start"),
    "TP-51": CodeGroup(None, "sink-full"),
    # Waited in vain for a rank that said nothing.
    "TP-6401": CodeGroup("FM-41", "rank-frozen"),
    "TP-6402": CodeGroup("FM-41", "rank-frozen"),
    "TP-6404": CodeGroup(None, "drain-stuck"),
    "TP-6241": CodeGroup("FM-51", "compile-regression"),
    "TP-66": CodeGroup(None, "out-of-memory"),
    # Told to leave: nobody's fault, and the stream is to be begun again.
    "TP-6403": CodeGroup(None, "restore"),
}
# A link to the top-level directory in a checkout, a copy of it in an installed package.
RUNBOOK_DIR = Path(__file__).resolve().parent / "books" / "runbooks"
NAME = re.compile(r"FM-\d\d")


def of_code(code: object) -> CodeGroup:
    """What a code alone says; nothing for one that is not in the table."""
    text = str(code)
    prefixes = [prefix for prefix in CODES if text.startswith(prefix)]
    return CODES[max(prefixes, key=len)] if prefixes else CodeGroup(None, None)


def fm_of(record: dict[str, Any]) -> str | None:
    """The failure mode of an error record: its own, or the one of its code."""
    own = record.get("fm")
    return own if isinstance(own, str) and NAME.fullmatch(own) else of_code(record.get("code")).fm


def words_of(fm: str | None) -> str | None:
    """A failure mode that this version does not know has no words."""
    return FAILURE_MODES[fm].words if fm in FAILURE_MODES else None


def runbook_id(fm: str | None, code: object = None) -> str | None:
    """The runbook to open, whether this checkout has it or not."""
    known, group = FAILURE_MODES.get(fm) if fm else None, of_code(code)
    return known.runbook if known and not group.first else group.runbook


def has_runbook(name: str) -> bool:
    return (RUNBOOK_DIR / f"{name}.md").is_file()
